"""Extrapolation formulas: weights of the last few snapshots as functions of their times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.polynomial import chebyshev, hermite
from numpy.typing import NDArray

from diffeff.methods.caching.curve import Curve

__all__ = ["Axis", "Blend", "Chebyshev", "Damped", "Hermite", "Polynomial", "Scaled", "Taylor", "Vector"]

Vector = NDArray[np.float64]
Axis = Literal["time", "index", "sigma"]


@dataclass(frozen=True)
class Polynomial:
    """The polynomial of degree `order` through the last snapshots: exact on such polynomials of time (Newton's form).

    Order 0 repeats the last snapshot, order 1 extrapolates a line (at the step site: Adams-Bashforth with the missing
    evaluation extrapolated). The higher the order, the more it amplifies what is not smooth. With fewer snapshots than
    it needs, the order is lower. Noise-prediction models are smoother over the index than over their sigma, which falls
    by half its range in the first few steps.
    """

    order: int
    axis: Axis = "time"

    @property
    def snapshots(self) -> int:
        return self.order + 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        used = list(times[-self.snapshots :])
        weights = [math.prod([1.0, *((t - b) / (a - b) for b in used if b != a)]) for a in used]
        return (*(0.0 for _ in times[len(used) :]), *weights)


@dataclass(frozen=True)
class Damped:
    """A predictor drawn towards the last snapshot: `strength` 1 is the predictor itself, 0 holds."""

    inner: Polynomial
    strength: float

    @property
    def axis(self) -> Axis:
        return self.inner.axis

    @property
    def snapshots(self) -> int:
        return self.inner.snapshots

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        weights = [self.strength * w for w in self.inner.coefficients(times, t)]
        weights[-1] += 1 - self.strength
        return tuple(weights)


@dataclass(frozen=True)
class Taylor:
    """TaylorSeer's sum D_i k^i / i! over differences of differences, as published (arXiv 2503.06923).

    k counts steps since the last computed one. From order 2 on it is not exact on polynomials of that degree, whose
    second term would be D_2 k (k + gap) / 2: it is a damped extrapolation, and amplifies noise less.
    """

    axis: ClassVar[Axis] = "index"
    order: int

    @property
    def snapshots(self) -> int:
        return self.order + 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        k = t - times[-1]
        terms = [k**i / math.factorial(i) * d for i, d in enumerate(_differences(times, self.order))]
        return tuple(np.sum(terms, axis=0).tolist())


@dataclass(frozen=True)
class Hermite:
    """HiCache: Taylor's powers k^i become s^i H_i(s k), with the physicists' Hermite polynomials (arXiv 2508.16984).

    At s = 0.5, its default, the slope is halved, which steadies long horizons.
    """

    axis: ClassVar[Axis] = "index"
    order: int
    scale: float

    @property
    def snapshots(self) -> int:
        return self.order + 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        k = t - times[-1]
        terms = [self._power(i, k) / math.factorial(i) * d for i, d in enumerate(_differences(times, self.order))]
        return tuple(np.sum(terms, axis=0).tolist())

    def _power(self, i: int, k: float) -> float:
        basis = [0.0] * i + [1.0]
        return float(self.scale**i * hermite.hermval(self.scale * k, basis))


@dataclass(frozen=True)
class Chebyshev:
    """A ridge fit of Chebyshev polynomials up to `order` over the last `window` snapshots (Spectrum, arXiv 2603.01623).

    The published form also shrinks the constant term, so that it predicts 0.83 to 0.90 of a constant; here the moves
    from the newest snapshot are fitted: constants are exact, and the more ridge, the closer to holding. Times from the
    oldest snapshot to the prediction are mapped to [-1, 1].
    """

    axis: ClassVar[Axis] = "time"
    order: int
    ridge: float
    window: int

    @property
    def snapshots(self) -> int:
        return self.window

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        if len(times) == 1:
            return (1.0,)
        at = 2 * (np.array([*times, t]) - times[0]) / (t - times[0]) - 1
        order = min(self.order, len(times) - 1)
        basis = chebyshev.chebvander(at, order)[:, 1:]
        known, asked = basis[:-1] - basis[-2], basis[-1] - basis[-2]  # moves from the newest snapshot are fitted
        gram = known.T @ known + self.ridge * np.eye(order)
        weights = asked @ np.linalg.solve(gram, known.T)
        weights[-1] += 1 - weights.sum()
        return tuple(weights.tolist())


@dataclass(frozen=True)
class Blend:
    """`share` of one predictor and the rest of another, on the same axis."""

    axis: ClassVar[Axis] = "time"
    first: Polynomial | Chebyshev
    second: Polynomial | Chebyshev
    share: float

    @property
    def snapshots(self) -> int:
        return max(self.first.snapshots, self.second.snapshots)

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        weights = [
            np.pad(p.coefficients(times[-p.snapshots :], t), (max(len(times) - p.snapshots, 0), 0))
            for p in (self.first, self.second)
        ]
        return tuple((self.share * weights[0] + (1 - self.share) * weights[1]).tolist())


@dataclass(frozen=True)
class Scaled:
    """The last snapshot, grown or shrunk as the size of such tensors does by a calibrated curve over sigma."""

    axis: ClassVar[Axis] = "sigma"
    curve: Curve

    @property
    def snapshots(self) -> int:
        return 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        then, now = self.curve(times[-1]), self.curve(t)
        return (*(0.0 for _ in times[1:]), now / then if then else 1.0)


def _differences(times: Sequence[float], order: int) -> list[Vector]:
    """D_0 .. D_order at the newest snapshot, each as its weights over all snapshots: D_i is the change of D_(i-1)
    between neighbouring snapshots over the time between them."""
    rows = list(np.eye(len(times)))
    found = [rows[-1]]
    for _ in range(min(order, len(times) - 1)):
        gaps = np.diff(times[-len(rows) :])
        rows = [(b - a) / gap for a, b, gap in zip(rows, rows[1:], gaps, strict=False)]
        found.append(rows[-1])
    return found
