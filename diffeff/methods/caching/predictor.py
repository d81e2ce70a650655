"""What stands in for a computed tensor: weighted sums of the last few snapshots, given as their coefficients.

Every training-free predictor published for diffusion caches is such a sum, so a predictor is a function of times only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffeff.core.run import Clock

__all__ = ["Hold", "Linear", "Predictor", "combine", "time_axis"]


class Predictor(Protocol):
    """Coefficients of up to `snapshots` remembered tensors."""

    snapshots: ClassVar[int]

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        """One weight per snapshot, for a prediction at `t` from snapshots at `times` (oldest first, all distinct)."""


@dataclass(frozen=True)
class Hold:
    """The last snapshot, unchanged: exact on constants."""

    snapshots: ClassVar[int] = 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        return (*(0.0 for _ in times[1:]), 1.0)


@dataclass(frozen=True)
class Linear:
    """The straight line through the last two snapshots: exact on what is linear in time. One snapshot is held.

    At the step site this is a two-step Adams-Bashforth formula with the missing evaluation extrapolated.
    """

    snapshots: ClassVar[int] = 2

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        if len(times) < 2:
            return Hold().coefficients(times, t)
        before, last = times[-2:]
        w = (t - last) / (last - before)
        return (*(0.0 for _ in times[2:]), -w, 1.0 + w)


def combine(snapshots: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The weighted sum, accumulated in float32 (float64 stays), in the snapshots' dtype. Always a new tensor."""
    terms = [(c, x) for c, x in zip(coefficients, snapshots, strict=True) if c]
    dtype = snapshots[-1].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = terms[0][1].to(wide) * terms[0][0]
    for c, x in terms[1:]:
        total.add_(x.to(wide), alpha=c)
    return total.to(dtype)


def time_axis(clock: Clock) -> tuple[float, ...]:
    """A strictly monotone time for every entry of the timestep list: sigma, else the timestep, else the index.

    Two-evaluation schedulers repeat sigmas and timesteps; extrapolating over those would divide by zero.
    """
    for values in (clock.sigmas, clock.timesteps):
        if values is None or len(values) < clock.total:
            continue
        times = values[: clock.total]
        gaps = times.diff()
        if bool(times.isfinite().all()) and (bool((gaps < 0).all()) or bool((gaps > 0).all())):
            return tuple(times.tolist())
    return tuple(float(i) for i in range(clock.total))
