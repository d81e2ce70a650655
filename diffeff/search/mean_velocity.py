"""The steps and spans of MeanCache: the best table of a given number of calls, exactly, from one plain run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffeff.core.clockwork import wind
from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.informed import MeanVelocity
from diffeff.methods.caching.predictor import combine
from diffeff.methods.caching.published.meancache import MeanCache, no_velocities
from diffeff.methods.caching.track import Moment, Snapshot
from diffeff.search.trace import Job, record

__all__ = ["best_path", "calibrate_meancache", "edge_costs"]

_SPANS = (1, 2, 3, 4, 5, 6)


def calibrate_meancache(pipe: Any, job: Job, config: MeanCache) -> MeanCache:
    """Chooses `config.computed` calls and the span after each. Raises ConfigError where the run has no more steps,
    MethodInapplicable for schedules of other than flow matching."""
    trace = record(pipe, job)
    clock = Clock()
    wind(clock, pipe.wrapped.scheduler)
    reason = no_velocities(clock)
    if reason:
        raise MethodInapplicable(f"meancache: {reason}")
    if not config.computed < trace.steps:
        raise ConfigError(
            f"meancache.computed is {config.computed}, of {trace.steps} steps; allowed: 2 to {trace.steps - 1}"
        )
    sigmas = () if clock.sigmas is None else tuple(clock.sigmas[: trace.steps].tolist())
    costs, spans = edge_costs(trace.predictions, sigmas)
    path = best_path(costs, config.computed, config.gamma)
    ends = [*path[1:], len(sigmas)]
    chosen = tuple(int(spans[i, j]) for i, j in zip(path, ends, strict=True))
    return replace(config, sigmas=tuple(sigmas[i] for i in path), spans=chosen)


def edge_costs(velocities: list[Tensor], sigmas: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[i, j]: how far latents stray, in mean absolute value, where step i is computed, j the next, and those between
    predicted with the best span; and that span. Steps before i are taken as computed; j may be one past the last."""
    steps = len(sigmas)
    costs = np.full((steps, steps + 1), np.inf)
    spans = np.ones((steps, steps + 1), dtype=np.int64)
    for i in range(steps):
        for span in _SPANS[: i + 1]:
            for j, cost in enumerate(_stray(velocities, sigmas, i, span), i + 1):
                if cost < costs[i, j]:
                    costs[i, j], spans[i, j] = cost, span
    return costs, spans


def _stray(velocities: list[Tensor], sigmas: tuple[float, ...], start: int, span: int) -> list[float]:
    """Summed error where all steps behind `start` are predicted: one value for each step the next call may be at."""
    predictor = MeanVelocity((sigmas[0],), (span,))
    ends = [*sigmas[1:], 0.0]
    at = [
        Moment(i, s, i, len(sigmas) - 1 - i, sigmas, end) for i, (s, end) in enumerate(zip(sigmas, ends, strict=True))
    ]
    used = [Snapshot(m, (v,)) for m, v in zip(at[: start + 1], velocities, strict=False)]
    total = [0.0]
    for moment in at[start + 1 :]:
        recent = used[-span:]
        weights = predictor.weigh(recent, moment, None)
        guess = combine([s.tensors[0] for s in recent if s.tensors[0] is not None], weights)
        error = float((guess - velocities[moment.index]).float().abs().mean())
        total.append(total[-1] + error * abs(moment.next_time - moment.time))
        used.append(Snapshot(moment, (guess,)))
    return total


def best_path(costs: NDArray[np.float64], computed: int, gamma: float) -> tuple[int, ...]:
    """The `computed` steps, the first among them, whose costs to the power `gamma` sum to the least."""
    steps = costs.shape[0]
    edges = costs**gamma
    best = np.full((computed, steps), np.inf)
    before = np.zeros((computed, steps), dtype=np.int64)
    best[0, 0] = 0.0
    for n in range(1, computed):
        through = best[n - 1][:, None] + edges[:, :steps]
        before[n], best[n] = through.argmin(axis=0), through.min(axis=0)
    path = [int((best[-1] + edges[:, steps]).argmin())]
    for n in range(computed - 1, 0, -1):
        path.append(int(before[n, path[-1]]))
    return tuple(reversed(path))
