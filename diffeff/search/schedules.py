"""The search for schedules: from one recorded run to the best one for any cost, then corrected on real runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.methods.caching.scheduled import DELTAS, FITTED
from diffeff.search.dynamic import Path, best_paths, best_several
from diffeff.search.replay import CANDIDATES, GAPS, Costs, Replay, costs, exact
from diffeff.search.schedule import Schedule
from diffeff.search.trace import Trace

__all__ = ["ScheduleSearch"]

Floats = NDArray[np.float64]


@dataclass
class ScheduleSearch:
    """All that was learnt from recorded runs, and the schedules that follow from it.

    `predictions` and `guidance` hold the inner products of the recorded runs; `sensitivity` is per step. Nothing
    here calls the model; `closed_loop` and `refit` correct what it finds on real runs.
    """

    predictions: Replay
    guidance: Replay | None
    sensitivity: Floats
    scale: float = 1.0
    """Guidance scale, as the recorded run shows it."""
    names: Sequence[str] = GAPS
    """What a gap may be filled with while steps are chosen."""
    depth: int = 3
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, sensitivity: Floats, **options: Any) -> ScheduleSearch:
        """From a recorded plain run. Raises ConfigError for one without its end."""
        if trace.final is None:
            raise ConfigError("the recorded run has no final latents")
        predictions = Replay.of(trace.predictions, trace.latents, trace.final, trace.times)
        if not trace.guided:
            return cls(predictions, None, sensitivity, **options)
        guidance = Replay.of(trace.differences, [c.float() for c in trace.cond], trace.final, trace.times)
        return cls(predictions, guidance, sensitivity, _guidance_scale(trace), **options)

    @property
    def steps(self) -> int:
        return self.predictions.steps

    @cached_property
    def table(self) -> Costs:
        """What each gap would cost."""
        return costs(self.predictions, self.sensitivity, self.names)

    @cached_property
    def paths(self) -> list[Path | None]:
        """The best sets of computed steps, by their number less one."""
        return best_paths(self.table.error)

    def several(self, computed: int, halved: int, most: int, names: Sequence[str] = CANDIDATES) -> list[Schedule]:
        """The `most` best schedules of so many computed steps, `halved` of them without the unconditional branch, as
        far as recorded runs show: where to begin a search on real runs."""
        found = []
        for path in best_several(self.table.error, computed, most):
            halving = self._halving(path.computed, computed - halved) if halved else (0.0, ())
            if halving is not None:
                found.append(self.assemble(path.computed, halving[1], names))
        return found

    # --- schedules ----------------------------------------------------------------------------------------------
    def schedule(self, rows: int) -> Schedule:
        """The best schedule, as far as recorded runs show, that computes `rows` branches (2 per step with guidance):
        how many steps, which, and at which of them the unconditional branch is left out.

        Raises ConfigError for fewer than one step's."""
        each = 1 if self.guidance is None else 2
        if rows < each:
            raise ConfigError(f"a schedule needs at least {each} computed branches, got {rows}")
        return self.schedules(rows)[0]

    def schedules(self, rows: int, names: Sequence[str] = CANDIDATES) -> list[Schedule]:
        """The best schedules of so many branches for every number of steps they may be spread over, the best first."""
        each, most = 1 if self.guidance is None else 2, min(rows, self.steps)
        pairs = [(n, n if self.guidance is None else rows - n) for n in range(-(-rows // each), most + 1)]
        found = [option for option in (self._split(*pair) for pair in pairs) if option is not None]
        if not found:
            return [self.assemble(tuple(range(self.steps)))]
        return [self.assemble(*option[1:], names) for option in sorted(found, key=lambda option: option[0])]

    def _split(self, computed: int, guided: int) -> tuple[float, tuple[int, ...], tuple[int, ...]] | None:
        """The error of computing that many steps, that many of them with both branches; which steps."""
        path = self.paths[computed - 1]
        if path is None or not 1 <= guided <= computed:
            return None
        if guided == computed:
            return path.error, path.computed, ()
        halving = self._halving(path.computed, guided)
        return None if halving is None else (float(np.hypot(path.error, halving[0])), path.computed, halving[1])

    def _halving(self, computed: tuple[int, ...], guided: int) -> tuple[float, tuple[int, ...]] | None:
        """Which computed steps leave the unconditional branch out, so that `guided` keep it, and the error of that.

        The same search on the guidance differences of the computed steps: kept ones are computed, others predicted.
        An error at a computed step is carried on by the steps predicted from it.
        """
        if self.guidance is None:
            return None
        part = self.guidance.taken(computed)
        table = costs(part, self.scale * self._carried(computed), (FITTED,))
        path = best_paths(table.error)[guided - 1]
        if path is None:
            return None
        return path.error, tuple(k for n, k in enumerate(computed) if n not in path.computed)

    def _carried(self, computed: tuple[int, ...]) -> Floats:
        """Sensitivity to an error at each computed step, the gap that follows it included."""
        ends = [*computed[1:], self.steps]
        return np.array([self.sensitivity[a:b].sum() for a, b in zip(computed, ends, strict=True)])

    def assemble(
        self, computed: Sequence[int], halved: Sequence[int] = (), names: Sequence[str] = CANDIDATES
    ) -> Schedule:
        """The schedule with these computed steps, `halved` ones among them without the unconditional branch, each gap
        filled by the best of the predictors `names`."""
        kept = set(computed) - set(halved)
        actions = tuple("both" if k in kept else "cond" if k in halved else "none" for k in range(self.steps))
        gaps = exact(self.predictions, self.sensitivity, list(computed), self.depth, names)
        predictors, weights = [], []
        for k in range(self.steps):
            if actions[k] != "none":
                continue
            known = [c for c in computed if c < k]
            name = gaps[known[-1]][0]
            predictors.append(name)
            if name == FITTED:
                weights.append(self.predictions.weights(FITTED, known[-self.depth :], k))
        times = self.predictions.times
        return Schedule(
            actions=actions,
            sigmas=times if times[-1] < times[0] else (),
            predictors=tuple(predictors),
            weights=tuple(weights),
            deltas=tuple(self._deltas(sorted(kept), k) for k in sorted(halved)),
            depth=self.depth,
            expected=float(np.sqrt(sum(error**2 for _, error in gaps.values()))),
            curve=tuple(error for _, error in gaps.values()),
            provenance=self.provenance,
        )

    def _deltas(self, kept: Sequence[int], step: int) -> tuple[float, ...]:
        """Weights of the last known guidance differences, oldest first, then of the conditional prediction."""
        if self.guidance is None:
            return ()
        known = [k for k in kept if k < step][-DELTAS:]
        present, *others = self.guidance.weights(FITTED, known, step)
        return (*others, present)


def _guidance_scale(trace: Trace) -> float:
    """How much of the guidance difference the guided prediction holds, by least squares over the run."""
    top = bottom = 0.0
    for guided, uncond, difference in zip(trace.predictions, trace.uncond, trace.differences, strict=True):
        if guided.shape != uncond.shape:
            return 1.0
        top += float(((guided.float() - uncond.float()) * difference).sum())
        bottom += float(difference.square().sum())
    return top / bottom if bottom else 1.0
