"""Wan 2.1 and 2.2 (text, image and video to video; one or two experts) and VACE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffeff.anatomy.build import Stack, TransformerAnatomy
from diffeff.anatomy.types import CFG, TextPadding

__all__ = ["WAN", "WAN_VACE"]


def _tokens(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    _, _, frames, height, width = arguments["hidden_states"].shape
    t, h, w = config.patch_size
    return frames // t, height // h, width // w


WAN = TransformerAnatomy(
    family="wan",
    title="Wan 2.1, Wan 2.2",
    classes=("WanTransformer3DModel",),
    stacks=(Stack("blocks"),),
    attentions={"attn1": "self", "attn2": "cross"},
    # control_hidden_states_scale counts VACE layers, not rows.
    rows=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "control_hidden_states"),
    cfg=CFG.SEPARATE,
    grid=_tokens,
    padding=TextPadding.ALIKE,
    notes=("Image-to-video models with a CLIP image run two attentions in each attn2: over the image, then the text.",),
)

WAN_VACE = replace(
    WAN,
    family="wan_vace",
    title="Wan VACE",
    classes=("WanVACETransformer3DModel",),
    padding=TextPadding.KEPT,  # the blocks beside the stack read the text too, and are no sites
    notes=(
        "vace_blocks run before the stack and are no part of it; their hints are added between its blocks, after each "
        "block listed in vace_layers.",
    ),
)
