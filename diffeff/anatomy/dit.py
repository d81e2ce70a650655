"""DiT: class-conditional image transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG

__all__ = ["DIT"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // config.patch_size, width // config.patch_size


def _guided(config: Any, arguments: Mapping[str, Any]) -> bool:
    """The pipeline steps the doubled latents, so their batch tells nothing; the second half is the null class."""
    labels = arguments["class_labels"]
    return len(labels) % 2 == 0 and bool((labels[len(labels) // 2 :] == config.num_embeds_ada_norm).all())


DIT = TransformerAnatomy(
    family="dit",
    title="DiT",
    classes=("DiTTransformer2DModel",),
    stacks=(Stack("transformer_blocks"),),
    attentions={"attn1": "self"},
    rows=("hidden_states", "timestep", "class_labels"),
    cfg=CFG.BATCHED_COND_FIRST,
    grid=_tokens,
    text=None,
    guided=_guided,
    notes=("The scheduler steps the doubled latents, both halves of them.",),
)
