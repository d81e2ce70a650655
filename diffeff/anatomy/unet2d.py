"""The image UNet of Stable Diffusion 1.x, 2.x and SDXL, with or without ControlNet, T2I-Adapter or IP-Adapter."""

from __future__ import annotations

from diffeff.anatomy.build import UNetAnatomy

__all__ = ["UNET2D"]

UNET2D = UNetAnatomy(
    family="unet2d",
    title="Stable Diffusion 1.x, 2.x, SDXL",
    classes=("UNet2DConditionModel",),
    rows=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
    ),
    notes=("ControlNet residuals are added to the skip connections and after the mid block.",),
)
