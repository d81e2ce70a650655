"""HunyuanVideo (text and image to video)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG

__all__ = ["HUNYUANVIDEO"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size


HUNYUANVIDEO = TransformerAnatomy(
    family="hunyuanvideo",
    title="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    stacks=(
        Stack("transformer_blocks", "double", ("image", "text")),
        Stack("single_transformer_blocks", "single", ("image", "text")),
    ),
    attentions={"attn": "joint"},
    rows=(
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "guidance",
    ),
    cfg=CFG.DISTILLED,
    grid=_tokens,
    text_first=False,
    notes=("The text refiner (context_embedder) runs before the stack and is no part of it.",),
)
