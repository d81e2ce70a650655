"""Predictors whose weights differ between frequency bands or groups of channels of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffeff.methods.caching.extrapolation import Hermite, Polynomial
from diffeff.methods.caching.predictor import Grouped, Predictor, accumulate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffeff.methods.caching.track import Moment, Snapshot

__all__ = ["GROUPED", "Banded", "banded_sum", "channel_dim", "channel_sum", "low_pass", "weights_of"]


def weights_of(predictor: Predictor, history: Sequence[Snapshot], at: Moment) -> tuple[float, ...]:
    """A predictor's weights over a history that may be longer than it uses."""
    used = [s.moment.on(predictor.axis) for s in history[-predictor.snapshots :]]
    return (*(0.0 for _ in history[len(used) :]), *predictor.coefficients(used, at.on(predictor.axis)))


def channel_dim(x: Tensor) -> int:
    """Where the channels of a tensor are: behind the rows of images and videos, last in token sequences."""
    return x.ndim - 1 if x.ndim < 4 else 1


def _space(x: Tensor) -> tuple[int, ...]:
    """Dimensions over which a tensor has frequencies: the pixels of each frame, or the one of a token sequence."""
    return (x.ndim - 2,) if x.ndim < 4 else (x.ndim - 2, x.ndim - 1)


def low_pass(x: Tensor, cutoff: float) -> Tensor:
    """The part of `x` below `cutoff` of the highest frequency (0 to 1), radially over the pixels of each frame, or
    along the sequence of tokens [rows, tokens, channels], which follows the raster. float32 at least; a projection."""
    dims = _space(x)
    spectrum = torch.fft.rfftn(x, dim=dims)
    radius = torch.zeros((), device=x.device)
    for dim in dims:
        make = torch.fft.rfftfreq if dim == dims[-1] else torch.fft.fftfreq
        shape = [-1 if d == dim else 1 for d in range(x.ndim)]
        radius = radius + make(x.shape[dim], device=x.device).reshape(shape).square()
    kept = spectrum * (radius.sqrt() <= cutoff / 2 + 1e-6)
    found: Tensor = torch.fft.irfftn(kept, s=[x.shape[d] for d in dims], dim=dims)
    return found


def banded_sum(tensors: Sequence[Tensor], weights: Sequence[Sequence[float]], cutoffs: Sequence[float]) -> Tensor:
    """A weighted sum for each band, put together: `weights[b]` holds up to `cutoffs[b]` (rising), the last above all.

    Equal weights in all bands are the plain sum, without a transform.
    """
    total = accumulate(tensors, weights[-1])
    for below, above, cutoff in zip(weights, weights[1:], cutoffs, strict=False):
        differ = [a - b for a, b in zip(below, above, strict=True)]
        if any(differ):
            total += low_pass(accumulate(tensors, differ), cutoff)
    return total.to(tensors[-1].dtype)


def channel_sum(tensors: Sequence[Tensor], weights: Sequence[Sequence[float]], members: Sequence[int]) -> Tensor:
    """A weighted sum for each group of channels: `weights[g]` holds for the channels whose entry of `members` is g."""
    last = tensors[-1]
    wide, dim = torch.promote_types(last.dtype, torch.float32), channel_dim(last)
    shape = [-1 if d == dim else 1 for d in range(last.ndim)]
    table = torch.tensor(weights, dtype=wide, device=last.device)[torch.tensor(members, device=last.device)]
    total = tensors[0].to(wide) * table[:, 0].reshape(shape)
    for x, column in zip(tensors[1:], table.T[1:], strict=True):
        total.addcmul_(x.to(wide), column.reshape(shape))
    return total.to(last.dtype)


@dataclass(frozen=True)
class Banded:
    """One predictor below `cutoff` (as a share of the highest frequency), another above.

    Holding below and a Hermite polynomial of degree 2 above is FreqCa (arXiv 2510.08669), which keeps the residual of
    the whole stack. The share of the low band is not published with it; a quarter is ours. At the step site frequencies
    are those of the latents' pixels, in token sequences those of the raster.
    """

    low: Predictor
    high: Predictor
    cutoff: float = 0.25

    @property
    def snapshots(self) -> int:
        return max(self.low.snapshots, self.high.snapshots)

    def fill(self, history: Sequence[Snapshot], tensors: Sequence[Tensor], at: Moment) -> Tensor:
        weights = [weights_of(predictor, history, at) for predictor in (self.low, self.high)]
        return banded_sum(tensors, weights, (self.cutoff,))


GROUPED: Mapping[str, Grouped] = MappingProxyType(
    {
        "freqca": Banded(Polynomial(0), Hermite(2, 0.5)),
        "low_band": Banded(Polynomial(2), Polynomial(1)),
    }
)
"""The predictors with groups, by the names users give."""
