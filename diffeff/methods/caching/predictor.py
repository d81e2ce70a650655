"""What stands in for a computed tensor: weighted sums of the last few snapshots, given as their coefficients.

Every training-free predictor published for diffusion caches is such a sum. Most weights are functions of times only
(`Predictor`); some follow what was measured (`Informed`), or differ between parts of a tensor (`Grouped`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffeff.core.run import Clock
from diffeff.methods.caching.extrapolation import (
    Axis,
    Blend,
    Chebyshev,
    Damped,
    Hermite,
    Polynomial,
    Scaled,
    Taylor,
)
from diffeff.methods.caching.multistep import BDF, AdamsBashforth, FoCa

if TYPE_CHECKING:
    from diffeff.methods.caching.track import Moment, Snapshot

__all__ = [
    "PREDICTORS",
    "AnyPredictor",
    "Axis",
    "Blend",
    "Chebyshev",
    "Damped",
    "Grouped",
    "Hermite",
    "Informed",
    "Polynomial",
    "Predictor",
    "Scaled",
    "Taylor",
    "accumulate",
    "combine",
    "over",
    "time_axis",
]


class Predictor(Protocol):
    """Coefficients of up to `snapshots` remembered tensors.

    `axis` says what it counts in: `time` is the run's own time (see `time_axis`), `index` the entries of the timestep
    list, for formulas that are published in steps and are not invariant to scale, `sigma` the scheduler's own noise
    level, for calibrated tables.
    """

    @property
    def axis(self) -> Axis:
        """What it counts in."""
        ...

    @property
    def snapshots(self) -> int:
        """How many snapshots it can use."""
        ...

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        """One weight per snapshot, for a prediction at `t` from snapshots at `times` (oldest first, all distinct)."""
        ...


@runtime_checkable
class Informed(Protocol):
    """A predictor whose weights follow more than times: what was measured at the snapshots and is at this step."""

    @property
    def snapshots(self) -> int:
        """How many snapshots it can use."""
        ...

    def weigh(self, history: Sequence[Snapshot], at: Moment, aux: Tensor | None) -> tuple[float, ...]:
        """One weight per snapshot (oldest first) for the step `at`, whose own probe is `aux`."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A predictor that treats parts of a tensor differently (frequency bands, channels), and so fills in itself."""

    @property
    def snapshots(self) -> int:
        """How many snapshots it can use."""
        ...

    def fill(self, history: Sequence[Snapshot], tensors: Sequence[Tensor], at: Moment) -> Tensor:
        """The prediction for the step `at` from one stream's `tensors` of the snapshots in `history` (oldest first); a
        new tensor of their dtype."""
        ...


AnyPredictor = Predictor | Informed | Grouped

PREDICTORS: Mapping[str, Predictor] = MappingProxyType(
    {
        "hold": Polynomial(0),
        "linear": Polynomial(1),
        "quadratic": Polynomial(2),
        "cubic": Polynomial(3),
        "damped": Damped(Polynomial(1), 0.5),
        "taylor": Taylor(2),
        "hermite": Hermite(2, 0.5),
        "chebyshev": Chebyshev(4, 0.1, 8),
        "adams_bashforth": AdamsBashforth(3),
        "bdf": BDF(3),
        "foca": FoCa(),
    }
)
"""The predictors that are functions of times, by the names users give."""


def over(predictor: Predictor, axis: Axis) -> Predictor:
    """A polynomial or multistep predictor drawn over another axis; the published forms keep the one they are defined
    on."""
    if isinstance(predictor, Damped):
        return replace(predictor, inner=replace(predictor.inner, axis=axis))
    return replace(predictor, axis=axis) if isinstance(predictor, Polynomial | AdamsBashforth | BDF) else predictor


def accumulate(snapshots: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The weighted sum in float32 (float64 stays). Always a new tensor."""
    wide = torch.promote_types(snapshots[-1].dtype, torch.float32)
    terms = [(c, x) for c, x in zip(coefficients, snapshots, strict=True) if c]
    if not terms:
        return torch.zeros_like(snapshots[-1], dtype=wide)
    total = terms[0][1].to(wide) * terms[0][0]
    for c, x in terms[1:]:
        total.add_(x.to(wide), alpha=c)
    return total


def combine(snapshots: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The weighted sum, accumulated in float32 (float64 stays), in the snapshots' dtype. Always a new tensor."""
    return accumulate(snapshots, coefficients).to(snapshots[-1].dtype)


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
