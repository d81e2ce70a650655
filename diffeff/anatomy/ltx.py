"""LTX-Video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG, TextPadding

__all__ = ["LTX"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    # The latents come packed; their grid is passed beside them, except where coordinates are given one by one.
    size = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return size if all(isinstance(n, int) for n in size) else None  # type: ignore[return-value]


LTX = TransformerAnatomy(
    family="ltx",
    title="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    stacks=(Stack("transformer_blocks"),),
    attentions={"attn1": "self", "attn2": "cross"},
    rows=("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "video_coords"),
    cfg=CFG.BATCHED_UNCOND_FIRST,
    grid=_tokens,
    padding=TextPadding.MASKED,
)
