"""Corrections on real runs: errors add up along the run and the model answers to them, which no recorded run shows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError
from diffeff.methods.caching.scheduled import ScheduledCache, ScheduledCacheMethod
from diffeff.search.replay import CANDIDATES
from diffeff.search.schedule import Schedule
from diffeff.search.schedules import ScheduleSearch
from diffeff.search.trace import Job, attached

__all__ = ["EndError", "halved_of", "local_swaps", "neighbours"]

log = logging.getLogger("diffeff")

Key = tuple[int, str]


class _Remembering(ScheduledCacheMethod):
    """The schedule, with computed outputs of steps before `valid` taken from memory."""

    def __init__(self, config: ScheduledCache, kept: dict[Key, Tensor], valid: int) -> None:
        super().__init__(config)
        self.kept, self.valid = kept, valid
        self.fresh: dict[Key, Tensor] = {}
        self.rows = 0

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        k = run.clock.index

        def remembered(asked: StepCall) -> Tensor:
            key = k, asked.branch
            if k < self.valid and key in self.kept:
                self.fresh[key] = self.kept[key]
                return self.kept[key].clone()
            self.rows += asked.rows
            found = proceed(asked)
            self.fresh[key] = found.detach().clone()
            return found

        return super().around_step(run, call, remembered)


@dataclass
class EndError:
    """The true error of schedules: of the final latents against the plain run's, relative, root mean square.

    Runs that begin like the best one so far take its first steps from memory. `rows` counts computed denoiser rows.
    """

    pipe: Any
    job: Job
    target: Tensor
    rows: int = 0
    residual: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Final latents less the plain run's, each run relative to its length, flat, in float64: of the last call."""
    base_residual: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The same of the schedule kept last."""
    _base: ScheduledCache | None = None
    _kept: dict[Key, Tensor] = field(default_factory=dict)
    _fresh: dict[Key, Tensor] = field(default_factory=dict)

    def __call__(self, schedule: Schedule) -> float:
        config = schedule.config()
        method = _Remembering(config, self._kept, _alike(self._base, config))
        with attached(self.pipe, method, self.job.beside) as run:
            final = run(self.job)
        self.rows += method.rows
        self._fresh = method.fresh
        target = self.target.double().flatten(1)
        gap = final.double().flatten(1) - target
        self.residual = (gap / target.norm(dim=1, keepdim=True) / math.sqrt(len(gap))).flatten()
        return float(self.residual.norm())

    def keep(self, schedule: Schedule) -> None:
        """`schedule`, which must be the one that ran last, is the best one so far."""
        self._base, self._kept, self.base_residual = schedule.config(), self._fresh, self.residual


def _alike(a: ScheduledCache | None, b: ScheduledCache) -> int:
    """How many steps two schedules treat alike from the start."""
    if a is None:
        return 0
    pairs = zip(_steps(a), _steps(b), strict=True)
    return next((k for k, (x, y) in enumerate(pairs) if x != y), len(b.actions))


def _steps(config: ScheduledCache) -> Iterator[tuple[Any, ...]]:
    fitted, deltas, names = config.fitted_weights(), config.delta_weights(), config.named()
    for k, action in enumerate(config.actions):
        yield action, names.get(k), fitted.get(k), deltas.get(k)


def halved_of(schedule: Schedule) -> tuple[int, ...]:
    """Steps that compute the conditional branch alone."""
    return tuple(k for k, action in enumerate(schedule.actions) if action == "cond")


def neighbours(
    computed: Sequence[int], halved: Sequence[int], steps: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Schedules that differ by one move: of a computed step, of all from one on by one step, or of the place of a half
    one with its neighbour's. Short moves and late ones first: less has to be computed anew to try them."""
    for distance in range(1, steps):
        for shift in (distance, -distance):
            for number in range(len(computed) - 1, 0, -1):
                yield from _moved(computed, halved, steps, shift, computed[number : number + 1])
        for shift in (1, -1) if distance == 1 else ():
            for number in range(len(computed) - 2, 0, -1):
                yield from _moved(computed, halved, steps, shift, computed[number:])
    for number in range(len(computed) - 1, 1, -1):
        a, b = computed[number - 1], computed[number]
        if (a in halved) != (b in halved):
            yield tuple(computed), tuple(sorted({*halved} ^ {a, b}))


def _moved(
    computed: Sequence[int], halved: Sequence[int], steps: int, shift: int, which: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The schedule with some steps moved; nothing where one of them would fall on another or out of the run."""
    moved, others = {k + shift for k in which}, {*computed} - {*which}
    if min(moved) > 0 and max(moved) < steps and not moved & others:
        yield tuple(sorted(others | moved)), tuple(sorted(h + shift if h in which else h for h in halved))


def local_swaps(
    search: ScheduleSearch,
    first: Schedule,
    evaluate: Callable[[Schedule], float],
    error: float,
    trials: int = 24,
    *,
    names: Sequence[str] = CANDIDATES,
    keep: Callable[[Schedule], None] = lambda schedule: None,
    observe: Callable[[float], None] = lambda done: None,
) -> tuple[Schedule, float]:
    """Move computed steps while the true error falls, for at most `trials` runs.

    `error` is that of `first`; `keep` hears of every better schedule right after it ran.
    """
    if trials < 0:
        raise ConfigError(f"trials is {trials}; it must not be negative")
    best, done, tried = first, 0, {(first.computed, halved_of(first))}
    moved = True
    while moved and done < trials:
        moved = False
        for candidate in neighbours(best.computed, halved_of(best), search.steps):
            if candidate in tried:
                continue
            if done >= trials:
                break
            tried.add(candidate)
            again = search.assemble(*candidate, names)
            found = evaluate(again)
            done += 1
            observe(done / trials)
            if found < error:
                best, error, moved = again, found, True
                keep(again)
                break
    log.debug("local swaps: error %.5f after %d trials", error, done)
    return best, error
