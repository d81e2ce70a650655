"""Temporal operators of video UNets on some pixels of all frames at a time, written into the feature map itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from torch import Tensor

from diffeff.methods.memory.norm import group_affine
from diffeff.methods.memory.resnet import activate, add, add_vector, bare
from diffeff.methods.memory.unet_attention import Context, Parts, basic_block, feed_forward

__all__ = ["Slices", "motion_module", "spatiotemporal_transformer", "temporal_resnet"]


@dataclass(frozen=True)
class Slices:
    """Ranges to cut dimensions into: `rows(rows, tokens a row, channels)` for residual blocks, `attended` likewise for
    attentions, `pixels(pixels, frames, channels)` for temporal operators, `parts(tokens, channels)` for feed-forwards.
    """

    rows: Callable[[int, int, int], list[tuple[int, int]]]
    attended: Callable[[int, int, int], list[tuple[int, int]]]
    pixels: Callable[[int, int, int], list[tuple[int, int]]]
    parts: Parts


@dataclass(frozen=True)
class _Video:
    """A feature map [clips * frames, channels, height, width] as clips of pixels through time."""

    map: Tensor
    frames: int
    slices: Slices

    @property
    def clips(self) -> Tensor:
        """[clips, frames, channels, pixels], a view."""
        x = self.map
        return x.view(-1, self.frames, x.shape[1], x.shape[2] * x.shape[3])

    def cuts(self) -> list[tuple[int, int]]:
        """Ranges of rows for what works frame by frame."""
        x = self.map
        return self.slices.attended(x.shape[0], x.shape[2] * x.shape[3], x.shape[1])

    def strips(self) -> Iterator[tuple[int, int, int]]:
        """Every (clip, first pixel, last pixel)."""
        clips, frames, channels, pixels = self.clips.shape
        for clip in range(clips):
            for start, stop in self.slices.pixels(pixels, frames, channels):
                yield clip, start, stop


def motion_module(module: Any, x: Tensor, frames: int, slices: Slices) -> None:
    """AnimateDiff's motion module on `x` [clips * frames, channels, height, width], written into it."""
    video = _Video(x, frames, slices)
    affine = group_affine(x, module.norm, x.shape[0] // frames, video.cuts())
    for clip, start, stop in video.strips():
        strip = video.clips[clip, :, :, start:stop]
        h = bare(module.proj_in)(affine.apply(strip, clip).permute(2, 0, 1).contiguous())
        for block in module.transformer_blocks:
            h = basic_block(bare(block), h, Context(), slices.parts)
        strip.add_(bare(module.proj_out)(h).permute(1, 2, 0))


def temporal_resnet(resnet: Any, mixer: Any, x: Tensor, temb: Tensor | None, images: Tensor, slices: Slices) -> None:
    """SVD's temporal residual block and its mix with the spatial one, on `x`, written into it.

    The first convolution's output is held whole, for the second norm's statistics: recomputing it would cost time.
    `temb`: [clips * frames, channels]; `images`: the indicator [clips, frames] of frames that are images.
    """
    frames = images.shape[-1]
    video = _Video(x, frames, slices)
    between = _Video(torch.empty_like(x), frames, slices)
    vector = None if temb is None else resnet.time_emb_proj(resnet.nonlinearity(temb)).view(-1, frames, x.shape[1])
    _convolve(resnet, resnet.norm1, resnet.conv1, video, lambda c, a, b, y: _put(between, c, a, b, y, vector))
    alpha = _alpha(mixer, images)

    def mix(clip: int, start: int, stop: int, y: Tensor) -> None:
        strip, weight = video.clips[clip, :, :, start:stop], alpha[clip, :, None, None].to(x.dtype)
        y = add(y, strip)
        strip.mul_(weight).add_(y.mul_(1 - weight))

    _convolve(resnet, resnet.norm2, resnet.conv2, between, mix)


def _convolve(resnet: Any, norm: Any, conv: Any, video: _Video, use: Callable[[int, int, int, Tensor], None]) -> None:
    """Norm, activation and a convolution over time, strip by strip: `use(clip, start, stop, [frames, channels, n])`."""
    affine = group_affine(video.map, norm, video.clips.shape[0], video.cuts())
    for clip, start, stop in video.strips():
        h = activate(resnet.nonlinearity, affine.apply(video.clips[clip, :, :, start:stop], clip))
        y = conv(h.transpose(0, 1)[None, ..., None])  # [1, channels, frames, pixels, 1]
        use(clip, start, stop, y[0, ..., 0].transpose(0, 1))


def _put(video: _Video, clip: int, start: int, stop: int, y: Tensor, vector: Tensor | None) -> None:
    strip = video.clips[clip, :, :, start:stop].copy_(y)
    if vector is not None:
        add_vector(strip, vector[clip, :, :, None].to(strip.dtype))


def _alpha(mixer: Any, images: Tensor) -> Tensor:
    """The weight of the spatial side of each frame: [clips, frames]."""
    alpha: Tensor = mixer.get_alpha(images, 3).reshape(-1)
    if mixer.switch_spatial_to_temporal_mix:
        alpha = 1 - alpha
    return alpha.expand(images.numel()).view(images.shape)


def spatiotemporal_transformer(module: Any, x: Tensor, text: Tensor, images: Tensor, slices: Slices) -> None:
    """SVD's transformer (spatial and temporal blocks in turn, mixed) on `x`, written into it.

    `text`: [clips * frames, tokens, channels]. Tokens between the blocks are held whole, once.
    """
    frames = images.shape[-1]
    video = _Video(x, frames, slices)
    rows, pixels = x.shape[0], x.shape[2] * x.shape[3]
    h = _project_in(module, video)
    moment = _frame_embedding(module, frames, h)
    alpha = _alpha(module.time_mixer, images)
    first = text.view(-1, frames, *text.shape[1:])[:, 0]
    tokens = h.view(-1, frames, pixels, h.shape[-1])
    last = len(module.transformer_blocks) - 1
    for index, (block, temporal) in enumerate(
        zip(module.transformer_blocks, module.temporal_transformer_blocks, strict=True)
    ):
        for start, stop in video.cuts():
            context = Context(text).take(start, stop, rows)
            h[start:stop] = basic_block(block, h[start:stop], context, slices.parts)
        for clip, start, stop in video.strips():
            strip, weight = tokens[clip, :, start:stop], alpha[clip, :, None, None].to(h.dtype)
            t = _temporal_block(temporal, strip + moment, first[clip : clip + 1], slices.parts)
            strip.mul_(weight).add_(t.mul_(1 - weight))
            if index == last:
                video.clips[clip, :, :, start:stop].add_(module.proj_out(strip).transpose(1, 2))


def _project_in(module: Any, video: _Video) -> Tensor:
    """Norm and projection, frame by frame: tokens [rows, pixels, channels]."""
    x = video.map
    h = x.new_empty(x.shape[0], x.shape[2] * x.shape[3], module.inner_dim)
    for start, stop in video.cuts():
        h[start:stop] = module.proj_in(module.norm(x[start:stop]).flatten(2).transpose(1, 2))
    return h


def _frame_embedding(module: Any, frames: int, like: Tensor) -> Tensor:
    """The embedding of each frame's index: [frames, 1, channels]."""
    index = torch.arange(frames, device=like.device)
    embedding: Tensor = module.time_pos_embed(module.time_proj(index).to(like.dtype))
    return embedding[:, None]


def _temporal_block(block: Any, strip: Tensor, text: Tensor, parts: Parts) -> Tensor:
    """One temporal block on `strip` [frames, pixels, channels], a new tensor; the same shape out."""
    frames, pixels, _ = strip.shape
    text = text.expand(pixels, -1, -1)
    if type(block) is not TemporalBasicTransformerBlock or not block.is_res:
        result: Tensor = block(strip, num_frames=frames, encoder_hidden_states=text)
        return result
    t = strip.transpose(0, 1).contiguous()
    del strip
    t = feed_forward(block.ff_in, block.norm_in, t, parts)
    t = add(t, block.attn1(block.norm1(t), encoder_hidden_states=None))
    if block.attn2 is not None:
        t = add(t, block.attn2(block.norm2(t), encoder_hidden_states=text))
    return feed_forward(block.ff, block.norm3, t, parts).transpose(0, 1)
