"""Group norm in two passes, whole or slice by slice, over frames and with SiLU: reference, kernels, and the rule."""

from __future__ import annotations

from diffeff.kernels.group_norm.dispatch import group_norm_two_pass
from diffeff.kernels.group_norm.reference import GroupStats, apply_stats, group_stats, joined, reference

__all__ = ["GroupStats", "apply_stats", "group_norm_two_pass", "group_stats", "joined", "reference"]
