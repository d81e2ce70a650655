"""Predictors whose weights follow what was measured, not times alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffeff.methods.caching.track import Moment, Snapshot

__all__ = ["MeanVelocity", "ProbeAligned"]


@dataclass(frozen=True)
class ProbeAligned:
    """Follows the line through the last two snapshots as far as a probe says the step has come (DiCache, 2508.17356).

    gamma = |p - p_b| / |p_a - p_b| with the probe p now and at the snapshots a (last) and b, kept to `low..high`; the
    prediction is b + gamma (a - b), so gamma 1 holds. One number is read back per predicted step.
    """

    low: float = 1.0
    high: float = 1.5

    @property
    def snapshots(self) -> int:
        return 2

    def weigh(self, history: Sequence[Snapshot], at: Moment, aux: Tensor | None) -> tuple[float, ...]:
        if len(history) < 2 or aux is None or history[-1].aux is None or history[-2].aux is None:
            return (*(0.0 for _ in history[1:]), 1.0)
        near, far = (_distance(p, history[-2].aux) for p in (aux, history[-1].aux))
        now, then = torch.stack([near, far]).tolist()
        gamma = min(max(now / then if then else self.low, self.low), self.high)
        return (1 - gamma, gamma)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.float() - y.float()).abs().mean()


@dataclass(frozen=True)
class MeanVelocity:
    """The mean velocity of the coming step, from those of the last `span` steps (MeanCache, arXiv 2601.19961).

    u is the mean velocity from the first of these steps to now, v_r the velocity at that first one: their difference
    over the way gone estimates how fast the mean turns (the paper's JVP), and v + JVP (s - t) carries the last used
    velocity on. A span of 1 holds. `spans[n]` serves below noise level `levels[n]`. The history must hold used
    velocities, predicted ones too.
    """

    levels: tuple[float, ...]
    """Noise levels, falling."""
    spans: tuple[int, ...]

    @property
    def snapshots(self) -> int:
        return max(self.spans, default=1)

    def span(self, sigma: float) -> int:
        """How many steps back to look at a step of this noise level."""
        rising = [-level for level in self.levels]
        return self.spans[max(bisect_left(rising, -sigma) - 1, 0)]

    def weigh(self, history: Sequence[Snapshot], at: Moment, aux: Tensor | None) -> tuple[float, ...]:
        used = history[-self.span(at.sigma) :]
        times = [s.moment.time for s in used] + [at.time]
        way, ahead = times[-1] - times[0], at.next_time - at.time
        turn = ahead / way
        weights = [turn * (b - a) / way for a, b in pairwise(times)]
        weights[0] -= turn
        weights[-1] += 1.0
        return (*(0.0 for _ in history[len(used) :]), *weights)
