"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG

__all__ = ["SD3"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // config.patch_size, width // config.patch_size


SD3 = TransformerAnatomy(
    family="sd3",
    title="Stable Diffusion 3, 3.5",
    classes=("SD3Transformer2DModel",),
    stacks=(Stack("transformer_blocks", returns=("text", "image")),),
    attentions={"attn": "joint", "attn2": "self"},  # attn2: the second, image-only attention of 3.5 medium
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "joint_attention_kwargs",
        "block_controlnet_hidden_states",
    ),
    cfg=CFG.BATCHED_UNCOND_FIRST,
    grid=_tokens,
    text_first=False,
    notes=(
        "The last block returns no text. ControlNet residuals are added between the blocks.",
        "Skip-layer guidance makes a third call per step with one row per image, and leaves out blocks in it.",
    ),
)
