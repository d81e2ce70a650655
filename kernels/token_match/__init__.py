"""Matching and merging of tokens: reference, Triton kernels, and the rule between them."""

from __future__ import annotations

from diffeff.kernels.token_match.dispatch import match_argmax, merge_scatter, token_groups, unmerge
from diffeff.kernels.token_match.reference import METRICS, Groups, match_reference, merge_reference

__all__ = [
    "METRICS",
    "Groups",
    "match_argmax",
    "match_reference",
    "merge_reference",
    "merge_scatter",
    "token_groups",
    "unmerge",
]
