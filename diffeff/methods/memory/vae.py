"""Autoencoders in slices: pictures one by one and in strips of rows, exactly; under a budget, video in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffeff.core.method import Undo
from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit_patch import override, watched
from diffeff.methods.memory.vae_rows import Noted, convolving, downsample, noting, resnet, upsample

__all__ = ["VaeSlicing", "slice_vae"]

ROWS = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
"""Autoencoders whose residual blocks run in strips of rows."""
TILES = ("AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo")
"""Autoencoders of videos that diffusers tiles."""


@dataclass(frozen=True)
class VaeSlicing:
    """What was done to an autoencoder: how to undo it, whether results stay the same, and a clause for the report."""

    undo: Undo
    exact: bool
    note: str


def slice_vae(vae: nn.Module, share: Share) -> VaeSlicing:
    """A lower peak while pictures are encoded and decoded.

    Exact for `ROWS`: residual blocks, samplers and heads run in strips of rows with the group norms' statistics of the
    whole picture, so that a block holds two maps whole instead of four; the rows of a batch one by one. Their attention
    at the latents' resolution stays whole, and so do the temporal blocks of AutoencoderKLTemporalDecoder.
    Those in `TILES` take the rows of a batch one by one, and, only where `share` is a number of bytes, work in spatial
    tiles that fit it, whose seams diffusers blends: not exact for videos larger than a tile. Others are left whole.

    Where gradients are asked for, layers run their plain forward.

    Source: tiles are diffusers' own; strips of rows with the statistics of the whole are ours.
    """
    name = type(vae).__name__
    with ExitStack() as stack:
        one_by_one = _one_by_one(stack, vae)
        if name in ROWS:
            count = sum(_patch(stack, module, share) for module in _parts(vae))
            note, exact = f"strips of rows in {count} layers", True
        elif name in TILES and share.activation_bytes is not None:
            size = _tile(stack, vae, share.activation_bytes)
            note, exact = f"blended tiles of {size} x {size} pixels where the video is larger", False
        else:
            note, exact = "whole pictures" if one_by_one else f"{name} is left whole", True
        more = ", one item of a batch at a time" if one_by_one else ""
        return VaeSlicing(stack.pop_all().close, exact, note + more)


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _one_by_one(stack: ExitStack, vae: Any) -> bool:
    if not hasattr(vae, "use_slicing"):
        return False
    _set(stack, vae, "use_slicing", True)
    return True


# --- strips of rows -------------------------------------------------------------------------------------------------
def _parts(vae: nn.Module) -> Iterator[nn.Module]:
    for coder in (getattr(vae, "encoder", None), getattr(vae, "decoder", None)):
        if coder is not None:
            yield from coder.modules()


def _patch(stack: ExitStack, module: Any, share: Share) -> int:
    """Let one module run in strips, where it is of a kind that can; returns how many layers that makes."""
    if _has_head(module):
        return _patch_head(stack, module, share)
    form = _form(module, share)
    if form is None or watched(module):
        return 0
    stack.callback(override(module, form))
    return 1


def _form(module: Any, share: Share) -> Callable[..., Tensor] | None:
    plain = module.forward
    if type(module) is ResnetBlock2D and _plain_resnet(module):
        return lambda x, temb=None: plain(x, temb) if _wants_gradients(x) else resnet(module, x, share)
    if type(module) is Upsample2D and module.use_conv and module.interpolate and not module.use_conv_transpose:
        return lambda x, output_size=None: (
            plain(x, output_size) if _wants_gradients(x) or output_size is not None else upsample(plain, x, share)
        )
    if type(module) is Downsample2D and module.use_conv and module.padding == 0:
        return lambda x: plain(x) if _wants_gradients(x) else downsample(plain, x, share)
    return None


def _plain_resnet(block: Any) -> bool:
    resampled = block.upsample is not None or block.downsample is not None
    return not resampled and block.time_emb_proj is None and block.time_embedding_norm in ("default", "group")


def _wants_gradients(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _has_head(module: Any) -> bool:
    layers = [getattr(module, name, None) for name in ("conv_norm_out", "conv_act", "conv_out")]
    return isinstance(layers[0], nn.GroupNorm) and all(isinstance(layer, nn.Module) for layer in layers)


def _patch_head(stack: ExitStack, module: Any, share: Share) -> int:
    norm, activation, conv = module.conv_norm_out, module.conv_act, module.conv_out
    if not isinstance(conv, nn.Conv2d) or any(watched(layer) for layer in (norm, activation, conv)):
        return 0
    plain = activation.forward
    stack.callback(override(norm, noting(norm)))
    stack.callback(
        override(activation, lambda x: replace(x, activation=activation) if isinstance(x, Noted) else plain(x))
    )
    stack.callback(override(conv, convolving(conv.forward, share)))
    return 1


# --- tiles ----------------------------------------------------------------------------------------------------------
_FRAMES = {"AutoencoderKLWan": 4, "AutoencoderKLCogVideoX": 8, "AutoencoderKLLTXVideo": 17}
"""Frames at full resolution that a decoder works on at once; the others take a tile's own number of frames."""
_STEPS = {"AutoencoderKLCogVideoX": 30}
"""Latents of which a tile's side is a multiple, so that its overlap (a quarter; a fifth and a sixth) is whole."""
_MAPS = 4
"""Maps of the outer level's channels that a residual block holds at once."""


def _tile(stack: ExitStack, vae: Any, limit: int) -> int:
    """Turn tiles on, of the side in pixels whose activations at full resolution fit `limit` bytes."""
    frames = _FRAMES.get(type(vae).__name__, getattr(vae, "tile_sample_min_num_frames", 16))
    channels = _outer_channels(vae)
    ratio = int(getattr(vae, "spatial_compression_ratio", 0) or 2 ** (len(vae.config.block_out_channels) - 1))
    step = ratio * _STEPS.get(type(vae).__name__, 4)
    pixels = limit / (_MAPS * channels * frames * next(vae.parameters()).element_size())
    size = max(int(math.sqrt(pixels)) // step, 1) * step
    _set(stack, vae, "use_tiling", True)
    for axis in ("height", "width"):
        _set(stack, vae, f"tile_sample_min_{axis}", size)
        if hasattr(vae, f"tile_sample_stride_{axis}"):
            _set(stack, vae, f"tile_sample_stride_{axis}", 3 * size // 4)
        if hasattr(vae, f"tile_latent_min_{axis}"):
            _set(stack, vae, f"tile_latent_min_{axis}", size // ratio)
    return size


def _outer_channels(vae: Any) -> int:
    """Channels of the decoder at full resolution."""
    convolutions = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv3d)]
    return int(convolutions[-1].in_channels)
