"""CogVideoX and CogVideoX 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG

__all__ = ["COGVIDEOX"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    _, frames, _, height, width = arguments["hidden_states"].shape  # frames come before channels
    return frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size


COGVIDEOX = TransformerAnatomy(
    family="cogvideox",
    title="CogVideoX, CogVideoX 1.5",
    classes=("CogVideoXTransformer3DModel",),
    stacks=(Stack("transformer_blocks", returns=("image", "text")),),
    attentions={"attn1": "joint"},
    # ofs is one value for all rows; image_rotary_emb counts tokens.
    rows=("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond"),
    cfg=CFG.BATCHED_UNCOND_FIRST,
    grid=_tokens,
)
