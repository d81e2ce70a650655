"""Attention with int8 scores: reference, Triton kernel, and the rule between them."""

from __future__ import annotations

from diffeff.kernels.int8_attention.dispatch import int8_attention_qk
from diffeff.kernels.int8_attention.reference import quantise_blocks, reference, smooth_keys

__all__ = ["int8_attention_qk", "quantise_blocks", "reference", "smooth_keys"]
