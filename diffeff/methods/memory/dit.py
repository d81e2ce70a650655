"""Feature slicing of transformers: which families, which blocks, and how the slices are put in and taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from diffeff.core.method import Undo
from diffeff.errors import MethodInapplicable
from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit_block import Embedder, Passed, SlicedBlock
from diffeff.methods.memory.dit_engine import Work
from diffeff.methods.memory.dit_head import deferring, projecting
from diffeff.methods.memory.dit_patch import override, watched

__all__ = ["FAMILIES", "slice_dit"]


@dataclass(frozen=True)
class _Family:
    """Where a transformer's parts are: stacks of blocks, the norms of its head and its last projection."""

    stacks: tuple[str, ...]
    forms: tuple[tuple[str, str], ...]
    """How the blocks of each class are cut: (class, function in a module of this folder)."""
    processors: tuple[str, ...]
    """The attention processors whose work the slices do."""
    embedder: tuple[str, str]
    """What makes tokens of the latents, and how its result has to be laid out."""
    norms: tuple[str, ...] = ("norm_out",)


_JOINT = ("transformer_blocks", "single_transformer_blocks")
FAMILIES: dict[str, _Family] = {
    "WanTransformer3DModel": _Family(
        ("blocks",), (("WanTransformerBlock", "dit_cross:wan"),), ("WanAttnProcessor",), ("patch_embedding", "grid")
    ),
    "LTXVideoTransformer3DModel": _Family(
        ("transformer_blocks",),
        (("LTXVideoTransformerBlock", "dit_cross:ltx"),),
        ("LTXVideoAttnProcessor",),
        ("proj_in", ""),
    ),
    "PixArtTransformer2DModel": _Family(
        ("transformer_blocks",),
        (("BasicTransformerBlock", "dit_cross:pixart"),),
        ("AttnProcessor2_0",),
        ("pos_embed", "copied"),
    ),
    "CogVideoXTransformer3DModel": _Family(
        ("transformer_blocks",),
        (("CogVideoXBlock", "dit_joint:cogvideox"),),
        ("CogVideoXAttnProcessor2_0",),
        ("patch_embed", ""),
        ("norm_final", "norm_out"),
    ),
    "HunyuanVideoTransformer3DModel": _Family(
        _JOINT,
        (
            ("HunyuanVideoTransformerBlock", "dit_hunyuan:hunyuan"),
            ("HunyuanVideoTokenReplaceTransformerBlock", "dit_hunyuan:hunyuan"),
            ("HunyuanVideoSingleTransformerBlock", "dit_hunyuan:hunyuan_single"),
            ("HunyuanVideoTokenReplaceSingleTransformerBlock", "dit_hunyuan:hunyuan_single"),
        ),
        ("HunyuanVideoAttnProcessor2_0",),
        ("x_embedder", "copied"),
    ),
    "FluxTransformer2DModel": _Family(
        _JOINT,
        (("FluxTransformerBlock", "dit_flux:flux"), ("FluxSingleTransformerBlock", "dit_flux:flux_single")),
        ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor"),
        ("x_embedder", ""),
    ),
    "SD3Transformer2DModel": _Family(
        ("transformer_blocks",),
        (("JointTransformerBlock", "dit_sd3:sd3"),),
        ("JointAttnProcessor2_0", "SD3IPAdapterJointAttnProcessor2_0"),
        ("pos_embed", "copied"),
    ),
}
"""The families by class of the transformer."""


def slice_dit(model: nn.Module, share: Share) -> Undo:
    """A lower peak of activations: the blocks and the head run on slices of tokens, exactly.

    Whole remain the streams of tokens and, per block, keys and values; queries, feed-forward and everything between
    exist for one slice at a time. Softmax rows are independent and the rest is token-wise, so the result is that of
    the plain model up to the rounding of differently shaped matrix products. `share` says how many slices.

    Saves memory in inference only: where gradients are asked for, blocks run their plain forward. Raises
    MethodInapplicable for a transformer that is not in `FAMILIES`, PlanConflict where the forward or the attention
    processor of a block is another tool's.

    Source: the grouping is that of Streamlined Inference (arXiv 2411.01171), which treats UNets; the form for
    transformers is ours.
    """
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        raise MethodInapplicable(
            f"feature_slicing does not know the transformer {type(model).__name__}. Known: {', '.join(FAMILIES)}."
        )
    with ExitStack() as stack:
        passed = Passed()
        _watch_embedder(stack, model, family, passed)
        for path, block in _blocks(model, family):
            sliced = SlicedBlock(block, path, _form(block, path, family), family.processors, share, passed)
            sliced.check()
            stack.callback(override(block, sliced.forward))
        _slice_head(stack, model, family, share)
        return stack.pop_all().close


def _blocks(model: nn.Module, family: _Family) -> Iterator[tuple[str, nn.Module]]:
    for name in family.stacks:
        for number, block in enumerate(getattr(model, name)):
            yield f"{name}.{number}", block


def _form(block: nn.Module, path: str, family: _Family) -> Callable[..., Work]:
    where = dict(family.forms).get(type(block).__name__)
    if where is None:
        raise MethodInapplicable(f"{path} is a {type(block).__name__}, which feature_slicing does not know")
    module, function = where.split(":")
    form: Callable[..., Work] = getattr(import_module(f"diffeff.methods.memory.{module}"), function)
    return form


def _watch_embedder(stack: ExitStack, model: nn.Module, family: _Family, passed: Passed) -> None:
    name, layout = family.embedder
    layer = getattr(model, name)
    if not watched(layer):
        stack.callback(override(layer, Embedder(layer.forward, layout, passed).forward))


def _slice_head(stack: ExitStack, model: Any, family: _Family, share: Share) -> None:
    layers = [getattr(model, name) for name in (*family.norms, "proj_out")]
    if any(watched(layer) for layer in layers):
        return  # someone else's hook expects tensors there
    *norms, last = layers
    for norm in norms:
        stack.callback(override(norm, deferring(norm)))
    stack.callback(override(last, projecting(share, last.forward)))
