"""Attention in slices of queries, over gathered, weighted, masked or listed keys: reference, kernel, and the rule."""

from __future__ import annotations

from diffeff.kernels.sliced_attention.dispatch import sliced_attention, sliced_attention_lse
from diffeff.kernels.sliced_attention.reference import BlockList, Extras, combine_chunks, reference

__all__ = ["BlockList", "Extras", "combine_chunks", "reference", "sliced_attention", "sliced_attention_lse"]
