"""Attention over few frames at very many positions: reference, Triton kernel, and the rule between them."""

from __future__ import annotations

from diffeff.kernels.temporal_attention.dispatch import MAX_FRAMES, temporal_attention
from diffeff.kernels.temporal_attention.reference import frame_bias, reference

__all__ = ["MAX_FRAMES", "frame_bias", "reference", "temporal_attention"]
