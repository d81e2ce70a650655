"""What `group_norm_two_pass` means, in plain torch, and the statistics that both passes share.

Pass one takes mean and sum of squared deviations of each (row, group) from parts of it that never meet in memory;
parts are joined by the update of Chan, Golub and LeVeque, which does not cancel as the difference of two large sums
does. Pass two normalises any part alone. Slices of a feature map can so be normalised exactly as the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GroupStats", "apply_stats", "group_stats", "joined", "reference"]


@dataclass(frozen=True)
class GroupStats:
    """Statistics of groups of channels: `mean` and `m2` (sum of squared deviations), float32 [rows, groups] each, over
    `count` numbers."""

    mean: Tensor
    m2: Tensor
    count: int

    def __add__(self, other: GroupStats) -> GroupStats:
        """The statistics of both parts together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return GroupStats(mean, m2, count)

    def inverse_std(self, eps: float) -> Tensor:
        """1 / sqrt(biased variance + eps), float32 [rows, groups]."""
        return (self.m2 / self.count + eps).rsqrt()


def group_stats(x: Tensor, groups: int) -> GroupStats:
    """Statistics of a feature map, or of any part of one, [rows, channels, ...]."""
    rows = x.shape[0]
    flat = x.reshape(rows, groups, -1).to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(flat, -1, correction=0)
    return GroupStats(mean, variance * flat.shape[-1], flat.shape[-1])


def joined(parts: Iterable[GroupStats]) -> GroupStats:
    """The statistics of all parts together. Raises ValueError when there are none."""
    total: GroupStats | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise ValueError("group_norm needs the statistics of at least one part")
    return total


def apply_stats(
    x: Tensor, stats: GroupStats, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """Pass two in plain torch: `x` [rows, channels, ...] normalised with given statistics, then SiLU if asked for.

    Scale and shift are folded into one factor and one summand per channel, so that the map is read once.
    """
    groups, channels = stats.mean.shape[1], x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = stats.inverse_std(eps).repeat_interleave(channels // groups, 1)
    factor = factor if weight is None else factor * weight.to(wide)
    shift = -stats.mean.repeat_interleave(channels // groups, 1) * factor
    shift = shift if bias is None else shift + bias.to(wide)
    shape = (*factor.shape, *(1,) * (x.ndim - 2))
    out = torch.addcmul(shift.view(shape), x.to(wide), factor.view(shape))
    return (F.silu(out, inplace=True) if silu else out).to(x.dtype)


def reference(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, frames: int
) -> Tensor:
    """See `group_norm_two_pass`; torch's own group norm where the statistics are of single rows."""
    if frames == 1:
        out = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(out) if silu else out
    stats = _over_frames(group_stats(x, groups), frames)
    return apply_stats(x, stats, weight, bias, eps, silu)


def _over_frames(stats: GroupStats, frames: int) -> GroupStats:
    """Statistics of rows [batch * frames] joined over frames, for every row again."""
    mean, m2 = (t.view(-1, frames, t.shape[1]) for t in (stats.mean, stats.m2))
    whole = mean.mean(1, keepdim=True)
    m2 = m2.sum(1, keepdim=True) + (mean - whole).square().sum(1, keepdim=True) * stats.count
    return GroupStats(whole.expand_as(mean).flatten(0, 1), m2.expand_as(mean).flatten(0, 1), stats.count * frames)
