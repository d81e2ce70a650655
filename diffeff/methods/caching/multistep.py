"""Multistep formulas of differential equations as predictors: slopes come from differences of snapshots.

A sum of n snapshots that is exact on polynomials of degree n - 1 is the polynomial through them, whatever formula it
was derived from: with two slopes, Adams-Bashforth and BDF are both `Polynomial(2)`. They differ where a formula is
exact on less than its snapshots allow, and amplifies what is not smooth less in return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffeff.methods.caching.extrapolation import Axis, Vector

__all__ = ["BDF", "AdamsBashforth", "FoCa"]


def _slopes(times: Sequence[float], count: int) -> tuple[Vector, Vector]:
    """The last `count` slopes between neighbours, as weights over all snapshots [count, n], and where they hold: half
    way between the two, where a difference is exact on quadratics."""
    eye, at = np.eye(len(times)), np.array(times)
    rows = np.diff(eye, axis=0) / np.diff(at)[:, None]
    return rows[-count:], ((at[1:] + at[:-1]) / 2)[-count:]


def _fit(nodes: Vector, functional: Vector) -> Vector:
    """Weights of values at `nodes` that give a functional of their interpolating polynomial, from what it gives for 1,
    s, s^2, ..."""
    return np.asarray(np.linalg.solve(np.vander(nodes, increasing=True).T, functional), np.float64)


@dataclass(frozen=True)
class AdamsBashforth:
    """Integrates the polynomial through the last `order` slopes from the newest snapshot on.

    Exact on polynomials up to degree 2 (order 1: up to 1); order 3 draws on four snapshots and lies between quadratic
    and cubic. With fewer snapshots the order is lower. Slopes taken at the newer end instead of half way make order 2
    the published TaylorSeer.
    """

    order: int
    axis: Axis = "time"

    @property
    def snapshots(self) -> int:
        return self.order + 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        if len(times) < 2:
            return (1.0,)
        slopes, nodes = _slopes(times, self.order)
        ahead, degrees = t - times[-1], np.arange(1, len(nodes) + 1)
        weights = _fit(nodes - times[-1], ahead**degrees / degrees) @ slopes
        weights[-1] += 1.0
        return tuple(weights.tolist())


@dataclass(frozen=True)
class BDF:
    """The backward differentiation formula of `order`: the polynomial through the last `order` snapshots and the
    prediction has, at the prediction, the slope extrapolated from the last `order` slopes.

    Exact on polynomials up to degree 2 (order 1: up to 1). With fewer snapshots the order is lower.
    """

    order: int
    axis: Axis = "time"

    @property
    def snapshots(self) -> int:
        return self.order + 1

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        if len(times) < 2:
            return (1.0,)
        slopes, nodes = _slopes(times, self.order)
        here = np.eye(len(nodes))[0]
        slope = _fit(nodes - t, here) @ slopes
        used = np.array([*times[-len(nodes) :], t]) - t
        derivative = _fit(used, np.eye(len(used))[1])  # at the prediction, of the values and of itself (last)
        slope[-len(nodes) :] -= derivative[:-1]
        return tuple((slope / derivative[-1]).tolist())


@dataclass(frozen=True)
class FoCa:
    """Forecast, then calibrate, step by step: each step continues the last slope (2 F_k - F_(k-1)), then takes the mean
    of that slope and the one between the last two computed steps (Heun).

    The last slope of a step right after a computed one leads from what had been predicted before it, so the formula
    remembers how it missed. Both slopes are per step of the timestep list; an implementation that leaves out the
    division by the gap between computed steps overshoots by that factor. The paper's step equations are known here from
    descriptions only, so this form is derived from them. Draws on `anchors` computed steps. Exact on lines.

    Source: FoCa (arXiv 2508.16211).
    """

    axis: ClassVar[Axis] = "index"
    anchors: int = 3

    @property
    def snapshots(self) -> int:
        return self.anchors

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        rows = list(np.eye(len(times)))
        if len(times) < 2:
            return (1.0,)
        before: Vector | None = None
        ends = [*times[2:], t]
        for n, end in enumerate(ends, 1):
            between = (rows[n] - rows[n - 1]) / (times[n] - times[n - 1])
            slope = between if before is None else rows[n] - before
            before, value = _march(rows[n], slope, between, round(end - times[n]))
        return tuple(value.tolist())


def _march(start: Vector, slope: Vector, between: Vector, steps: int) -> tuple[Vector, Vector]:
    """The last two values of so many steps from a computed one."""
    before = value = start
    for _ in range(steps):
        slope = (slope + between) / 2
        before, value = value, value + slope
    return before, value
