"""SmoothCache: each kind of module is computed at steps of its own, chosen by errors measured on your model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffeff.anatomy.types import ModuleKind, ModuleSite
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.errors import ConfigError
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.module_cache import MODULES, Modules
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.predictor import time_axis
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["ErrorTable", "SmoothCache", "longest_skips"]


@dataclass(frozen=True)
class ErrorTable:
    """Relative L1 error of repeating a kind of module's output: `errors[i][k - 1]` for the output of step i - k used
    at step i. Between steps, and at other distances, it is interpolated; beyond the longest measured it is unknown."""

    times: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]

    def at(self, before: float, now: float) -> float:
        """Error at time `now` of the output of time `before`; inf where it was not measured."""
        positions = [self._position(t) for t in (before, now)]
        gap, place = positions[1] - positions[0], positions[1]
        low, high = int(np.floor(place)), min(int(np.ceil(place)), len(self.errors) - 1)
        share = place - low
        return (1 - share) * self._row(low, gap) + share * self._row(high, gap) if share else self._row(low, gap)

    def _position(self, t: float) -> float:
        order = np.argsort(self.times)
        found = float(np.interp(t, np.array(self.times)[order], order.astype(float)))
        return round(found) if abs(found - round(found)) < 1e-6 else found

    def _row(self, step: int, gap: float) -> float:
        known = (0.0, *self.errors[step])
        if gap > len(known) - 1 + 1e-6:
            return float("inf")
        return float(np.interp(gap, range(len(known)), known))


def longest_skips(table: ErrorTable, axis: Sequence[float], limit: float, first: int, horizon: int) -> set[int]:
    """Entries that are computed: from each computed one the longest stretch, up to `horizon` entries, whose errors all
    stay within `limit` is skipped. `first` and the last entry are computed."""
    computed, at, last = {first}, first, len(axis) - 1
    while at < last:
        skips = 0
        while skips < horizon and at + skips + 1 < last and table.at(axis[at], axis[at + skips + 1]) <= limit:
            skips += 1
        at += skips + 1
        computed.add(at)
    return computed


@dataclass(frozen=True, kw_only=True)
class SmoothCache(CacheConfig):
    """Attention and feed-forward outputs are reused exactly where they were measured to change little.

    For every kind of module, a calibration run has measured the relative L1 error of repeating its output for one step
    up to `horizon` steps, averaged over blocks and prompts. From each computed step, as many steps are skipped as keep
    that error within `threshold`; the first and the last step are computed. Kinds follow schedules of their own.

    `kinds`, `times` and `errors` are that table: kinds by name, the noise level of each calibrated step, and one error
    per kind, step and distance (in this order; a huge one where a step lies too early). Make them with
    `diffeff.search.profiles.error_table`.

    Differs: at other numbers of steps the table is interpolated over the noise level, where the published one is for
    one number.

    Defaults: the paper's thresholds are 0.08 to 0.35, by model and number of steps; 0.15 is ours.

    Holds one output per module and branch.

    Source: SmoothCache (arXiv 2411.10510).
    """

    name: ClassVar[str] = "smoothcache"
    summary: ClassVar[str] = "Each kind of module is computed at its own steps, chosen by errors measured beforehand."

    threshold: float = knob(0.15, "largest error of a reused output; 0 is exact", low=0.0, high=5.0, step=0.01)
    kinds: tuple[str, ...] = knob((), "kinds of modules in the table")
    times: tuple[float, ...] = knob((), "noise level (or index) of each calibrated step")
    errors: tuple[float, ...] = knob((), "error by kind, step and distance")
    horizon: int = knob(3, "longest measured distance: most steps skipped in a row", low=1, high=16, step=1)

    def check(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in MODULES]
        if unknown:
            raise ConfigError(f"smoothcache.kinds holds {unknown[0]!r}; allowed: {', '.join(MODULES)}")
        wanted = len(self.kinds) * len(self.times) * self.horizon
        if len(self.errors) != wanted:
            raise ConfigError(
                f"smoothcache.errors has {len(self.errors)} values; {len(self.kinds)} kinds, {len(self.times)} times "
                f"and horizon {self.horizon} need {wanted}"
            )

    def table(self, kind: str) -> ErrorTable:
        """The errors of one kind."""
        steps, size = len(self.times), self.horizon
        begin = self.kinds.index(kind) * steps * size
        rows = (self.errors[begin + i * size : begin + (i + 1) * size] for i in range(steps))
        return ErrorTable(self.times, tuple(tuple(row) for row in rows))

    def _rule(self, site: ModuleSite, clock: Clock) -> Policy:
        axis = time_axis(clock)
        return AtEntries(
            frozenset(longest_skips(self.table(site.kind), axis, self.threshold, clock.first, self.horizon))
        )

    def recipe(self) -> Recipe:
        missing = (
            "it has no table of errors of this model (kinds, times, errors). Make one with "
            "diffeff.search.profiles.error_table(pipe, job, config)."
        )
        kinds: tuple[ModuleKind, ...] = tuple(kind for kind in MODULES if kind in self.kinds)
        site = Modules(kinds or MODULES, rule=self._rule)
        return Recipe(
            site, Interval(1), first=1, last=1, exact=self.threshold == 0, missing="" if self.errors else missing
        )
