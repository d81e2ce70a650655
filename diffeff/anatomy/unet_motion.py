"""AnimateDiff: an image UNet with motion modules, also in its SDXL form."""

from __future__ import annotations

from diffeff.anatomy.build import UNetAnatomy

__all__ = ["UNET_MOTION"]

UNET_MOTION = UNetAnatomy(
    family="unet_motion",
    title="AnimateDiff, AnimateDiff SDXL",
    classes=("UNetMotionModel",),
    # The text embeddings come repeated, one entry per frame.
    rows=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "timestep_cond",
        "attention_mask",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
    ),
    temporal=("motion_modules",),
    notes=("Inside the UNet frames are batch rows; only the motion modules see several frames at once.",),
)
