"""Schedules known before the run: which entries of the timestep list are computed, as published rules name them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffeff.core.run import Clock
from diffeff.methods.caching.policy import Action, Situation

__all__ = ["AtEntries", "centred", "every", "falling", "thousandths", "within"]


@dataclass(frozen=True)
class AtEntries:
    """Computes at these entries of the scheduler's whole list, and nowhere else."""

    computed: frozenset[int]

    def decide(self, at: Situation) -> Action:
        return Action.COMPUTE if at.index in self.computed else Action.PREDICT


def thousandths(clock: Clock) -> tuple[float, ...]:
    """The timesteps of the whole list on the scale from 1000 (noise) to 0 that published windows are given in.

    Schedulers with timesteps of another scale (log sigmas, fractions) get the run's progress on that scale instead.
    """
    if clock.timesteps is not None and float(clock.timesteps.max()) > 10:
        return tuple(clock.timesteps[: clock.total].tolist())
    return tuple(1000 * (1 - (i - clock.first) / max(clock.length, 1)) for i in range(clock.total))


def within(clock: Clock, low: float, high: float) -> frozenset[int]:
    """Entries whose timestep lies between `low` and `high`, both excluded."""
    return frozenset(i for i, t in enumerate(thousandths(clock)) if low < t < high)


def every(clock: Clock, interval: int, window: frozenset[int] | None = None) -> AtEntries:
    """Every `interval`-th entry of the run, counted from its first one; outside the `window` all of them."""
    entries = range(clock.first, clock.total)
    return AtEntries(
        frozenset(i for i in entries if (i - clock.first) % interval == 0 or (window is not None and i not in window))
    )


def centred(clock: Clock, computed: int, centre: float, power: float) -> AtEntries:
    """`computed` entries, dense around the share `centre` of the run and sparse away from it: their distances from it
    are evenly spaced in the root `power` (after DeepCache, arXiv 2312.00858). The first one is among them."""
    middle = centre * clock.length
    low, high = (np.sign(x) * abs(x) ** (1 / power) for x in (-middle, clock.length - middle))
    roots = np.linspace(low, high, computed, endpoint=False)
    places = np.sign(roots) * np.abs(roots) ** power + middle
    return AtEntries(frozenset({clock.first, *(clock.first + int(p + 1e-6) for p in places)}))


def falling(clock: Clock, first: int, longest: int, shortest: int) -> AtEntries:
    """The first `first` + 1 entries, then gaps that shrink evenly from `longest` to `shortest` at the run's end
    (ProfilingDiT, arXiv 2504.03140)."""
    chosen, at = set(range(min(first + 1, clock.length))), first
    while at < clock.length:
        chosen.add(at)
        share = (at - first) / max(clock.length - first, 1)
        at += max(int(longest - (longest - shortest) * share), 1)
    return AtEntries(frozenset(clock.first + i for i in chosen))
