"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG, TextPadding

__all__ = ["PIXART"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // config.patch_size, width // config.patch_size


PIXART = TransformerAnatomy(
    family="pixart",
    title="PixArt-alpha, PixArt-sigma",
    classes=("PixArtTransformer2DModel",),
    stacks=(Stack("transformer_blocks"),),
    attentions={"attn1": "self", "attn2": "cross"},
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    ),
    cfg=CFG.BATCHED_UNCOND_FIRST,
    grid=_tokens,
    padding=TextPadding.MASKED,
)
