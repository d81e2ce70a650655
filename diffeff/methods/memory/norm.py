"""Group normalisation in two passes: the statistics of the whole first, then any part of it on its own, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Affine", "group_affine"]


@dataclass(frozen=True)
class Affine:
    """What a group norm does once its statistics are known: `x * scale + shift` per item and channel.

    `scale`, `shift`: [items, channels], float32.
    """

    scale: Tensor
    shift: Tensor

    def apply(self, part: Tensor, item: int) -> Tensor:
        """Normalise `part`: [frames, channels, pixels] of one item, any frames and pixels of it; a new tensor."""
        scale, shift = self.scale[item, :, None], self.shift[item, :, None]
        if part.dtype is torch.float32:
            return torch.addcmul(shift, part, scale)
        return torch.addcmul(shift, part.float(), scale).to(part.dtype)


def group_affine(x: Tensor, norm: nn.GroupNorm, items: int, cuts: Sequence[tuple[int, int]]) -> Affine:
    """The statistics of `norm` over all frames and pixels of each item, read frame by frame.

    `x`: [items * frames, channels, ...]. Of the frames no more than one of `cuts` (ranges of dimension 0) is worked on
    at once. Means and variances of frames are combined as equal parts of a whole: var = mean(var) + var(means).
    """
    moments = [_moments(x[a:b], norm) for a, b in cuts]
    mean = torch.cat([m for m, _ in moments]).view(items, -1, norm.num_groups)
    spread = torch.cat([s for _, s in moments]).view(items, -1, norm.num_groups)
    centre = mean.mean(1)
    variance = (spread + (mean - centre[:, None]).square()).mean(1)
    return _affine(norm, centre, (variance + norm.eps).rsqrt())


def _moments(rows: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of each row: [rows, groups], float32.

    Through the norm's own kernel, whose reciprocal deviations give the variances back: it is many times faster on a
    CPU than `var_mean`.
    """
    n, channels, pixels = rows.shape[0], rows.shape[1], rows[0, 0].numel()
    _, mean, rstd = torch.native_group_norm(
        rows.float().contiguous(), None, None, n, channels, pixels, norm.num_groups, norm.eps
    )
    mean, rstd = mean.view(n, -1), rstd.view(n, -1)
    return mean, (rstd.double().pow(-2) - norm.eps).clamp_min(0).float()


def _affine(norm: nn.GroupNorm, mean: Tensor, rstd: Tensor) -> Affine:
    """Fold statistics [items, groups] into the norm's weight and bias."""
    width = norm.num_channels // norm.num_groups
    scale, mean = rstd.repeat_interleave(width, 1), mean.repeat_interleave(width, 1)
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.float()
    return Affine(scale, shift)
