"""FLUX.1 (dev, schnell and those with the same transformer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG

__all__ = ["FLUX"]

# Reading the ids waits for the device: once per tensor, which a pipeline makes once per run.
_SIZES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The latents come packed into a sequence: only the position ids (frame, row, column) know their grid.

    Ids that are no full grid (reference images beside the image, several images in a row) give no size.
    """
    ids = arguments.get("img_ids")
    if not isinstance(ids, Tensor):
        return None
    if ids not in _SIZES:
        _SIZES[ids] = _size(ids[0] if ids.ndim == 3 else ids)
    found: tuple[int, int, int] | None = _SIZES[ids]
    return found


def _size(ids: Tensor) -> tuple[int, int, int] | None:
    frame, row, column = ids.amax(0).long().tolist()
    size = (1, row + 1, column + 1)
    return size if frame == 0 and size[1] * size[2] == ids.shape[0] else None


FLUX = TransformerAnatomy(
    family="flux",
    title="FLUX.1",
    classes=("FluxTransformer2DModel",),
    stacks=(
        Stack("transformer_blocks", "double", ("text", "image")),
        Stack("single_transformer_blocks", "single", ("text", "image")),
    ),
    attentions={"attn": "joint"},
    # img_ids and txt_ids count tokens. joint_attention_kwargs carries the image prompts of IP-Adapters.
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    ),
    cfg=CFG.DISTILLED,
    grid=_tokens,
    notes=("ControlNet residuals are added between the blocks.",),
)
