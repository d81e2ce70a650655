"""Which steps to compute: the best schedule of a given cost, from recorded runs first, then on real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffeff.errors import ConfigError
from diffeff.methods.caching.scheduled import FITTED
from diffeff.search.closed_loop import EndError, halved_of, local_swaps
from diffeff.search.refit import refit
from diffeff.search.schedule import Schedule
from diffeff.search.schedules import ScheduleSearch
from diffeff.search.trace import Job, Trace

__all__ = ["choose", "corrected"]

SEVERAL = 20
"""How many of the best schedules on record are tried on real runs."""
SPLITS = 5
"""How many numbers of steps, for the same number of branches, are tried on real runs."""


def choose(
    search: ScheduleSearch,
    rows: int,
    evaluate: EndError,
    swaps: int = 24,
    *,
    several: int = SEVERAL,
    observe: Callable[[float], None] = lambda done: None,
) -> tuple[Schedule, float]:
    """The schedule of `rows` computed branches whose real run ends nearest to the plain one, and how near.

    Tried on real runs: the best split of the branches over steps, of several on record; the `several` best sets of
    computed steps of that split; then up to `swaps` moves of steps. `evaluate` keeps the best one's run.
    """
    splits = search.schedules(rows, (FITTED,))[:SPLITS]
    split = splits[0] if len(splits) == 1 else min(splits, key=evaluate)
    others = search.several(len(split.computed), len(halved_of(split)), several, (FITTED,))
    error, best = min(((evaluate(s), s) for s in [split, *others]), key=lambda pair: pair[0])
    evaluate(best)
    evaluate.keep(best)
    return local_swaps(search, best, evaluate, error, swaps, names=(FITTED,), keep=evaluate.keep, observe=observe)


def corrected(
    pipe: Any,
    job: Job,
    trace: Trace,
    search: ScheduleSearch,
    rows: int,
    *,
    rounds: int = 3,
    swaps: int = 24,
    observe: Callable[[float, str], None] = lambda done, what: None,
) -> Schedule:
    """The best schedule of `rows` computed branches, its weights adjusted to where the plain run of `job` ends.

    `trace` is that run, `search` what was learnt from it. `observe` hears of two stages, `steps` and `weights`, each
    from 0 to 1. Raises ConfigError for a trace without its end.
    """
    if trace.final is None:
        raise ConfigError("the recorded run has no final latents")
    evaluate = EndError(pipe, job, trace.final)
    best, _ = choose(search, rows, evaluate, swaps, observe=lambda done: observe(done, "steps"))
    best, error = refit(best, evaluate, rounds, observe=lambda done: observe(done, "weights"))
    return replace(best, expected=error)
