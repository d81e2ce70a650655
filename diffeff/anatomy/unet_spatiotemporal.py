"""Stable Video Diffusion."""

from __future__ import annotations

from diffeff.anatomy.build import UNetAnatomy

__all__ = ["UNET_SPATIOTEMPORAL"]

UNET_SPATIOTEMPORAL = UNetAnatomy(
    family="unet_spatiotemporal",
    title="Stable Video Diffusion",
    classes=("UNetSpatioTemporalConditionModel",),
    rows=("sample", "timestep", "encoder_hidden_states", "added_time_ids"),
    temporal=("temporal_transformer_blocks",),
    notes=("Each temporal block also attends to the image embedding of the first frame: those sites count as cross.",),
)
