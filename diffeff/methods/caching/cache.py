"""What the caches of all sites share: one decision per step, a history per branch, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.method import Method
from diffeff.core.run import Clock, Run
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.policy import Action, Threshold
from diffeff.methods.caching.predictor import time_axis
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.track import Moment, Part, Statistics, Track

__all__ = ["CacheMethod", "Ledger", "join"]


@dataclass
class Ledger:
    """What the cache of one site remembers in one run: tracks by group of rows."""

    tracks: dict[int, Track] = field(default_factory=dict)
    sizes: set[torch.Size] = field(default_factory=set)
    """Sizes at which a segment was computed: stand-ins for skipped UNet blocks need one computed at their size."""
    statistics: Statistics = field(default_factory=Statistics)

    def weigh(self) -> None:
        """Note what is held now, for the report's peak."""
        held = sum(track.bytes_held() for track in self.tracks.values())
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, held)


class CacheMethod(Method[CacheConfig]):
    """Runs a recipe; each site says what is observed and what stands in."""

    skipped: ClassVar[str] = "steps"
    """What the report calls what was predicted."""

    def __init__(self, config: CacheConfig, recipe: Recipe) -> None:
        super().__init__(config)
        self.recipe = recipe

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if self.recipe.missing:
            raise MethodInapplicable(f"{self.config.name}: {self.recipe.missing}")

    def begin(self, run: Run) -> None:
        recipe, length = self.recipe, run.clock.length
        if length <= recipe.first + recipe.last and not recipe.exact:
            raise ConfigError(
                f"{self.config.name}: {length} steps are too few for a cache, because the first {recipe.first} and the "
                f"last {recipe.last} are always computed. Run at least {recipe.first + recipe.last + 2} steps, lower "
                "these numbers, or leave the cache out (few-step models gain nothing from it)."
            )

    def _ledger(self, run: Run, site: str) -> Ledger:
        return run.state(self, Ledger, site=site, branch="")

    def _track(self, ledger: Ledger, group: int) -> Track:
        if group not in ledger.tracks:
            recipe = self.recipe
            indicator = None if recipe.indicator is None else recipe.indicator()
            ledger.tracks[group] = Track(recipe.rules, recipe.predictor, indicator, recipe.feedback)
        return ledger.tracks[group]

    def _moment(self, run: Run) -> Moment:
        clock = run.clock
        axis, sigmas = run.state(self, lambda: (time_axis(clock), _noise_levels(clock)), site="time axis", branch="")
        following = axis[clock.index + 1] if clock.left else 0.0
        return Moment(clock.index, axis[clock.index], clock.done, clock.left, sigmas, following)

    def _to_compute(self, ledger: Ledger, parts: list[Part], at: Moment, look: Callable[[Part], Tensor]) -> list[Part]:
        """The parts of a call that must be computed. `look` gives what the indicator sees of a part."""
        for part in sorted(parts, key=lambda p: p.branch != "cond"):  # the conditional branch leads where it is there
            track = self._track(ledger, part.group)
            track.decide(at, part.branch, lambda part=part: look(part), ledger.statistics)  # type: ignore[misc]
        return [p for p in parts if self._must_compute(ledger.tracks[p.group], p)]

    @staticmethod
    def _must_compute(track: Track, part: Part) -> bool:
        return track.action is Action.COMPUTE or not track.ready(part.branch)

    @staticmethod
    def _count(statistics: Statistics, parts: list[Part], todo: list[Part], at: Moment) -> None:
        for branch in dict.fromkeys(p.branch for p in parts):
            asked = sum(p.branch == branch for p in parts)
            statistics.count(branch, at.index, sum(p.branch == branch for p in todo) / asked)

    def _shown(self, run: Run, x: Tensor) -> Tensor:
        """What the indicator sees of what the site shows it."""
        return x if self.recipe.view is None else self.recipe.view(run, x)

    # --- report -------------------------------------------------------------------------------------------------
    def _ledgers(self, run: Run) -> dict[str, Ledger]:
        return {site: s for (_, site), s in run.states(self).items() if isinstance(s, Ledger)}

    def engaged(self, run: Run) -> tuple[bool, str]:
        found = [ledger.statistics for ledger in self._ledgers(run).values()]
        skipped = {index for s in found for index in s.skipped}
        if skipped:
            rows = " (in some rows of the batch)" if self.recipe.per_row else ""
            return True, f"{len(skipped)} of {run.clock.length} {self.skipped} predicted{rows}"
        return False, self._idle_reason([c for s in found for c in s.changes], bool(found))

    def _idle_reason(self, changes: list[float], called: bool) -> str:
        if not called:
            return "the site was never reached"
        if self.recipe.exact:
            return "nothing was skipped, as asked: these options compute every step"
        limit = self.recipe.policy.limit if isinstance(self.recipe.policy, Threshold) else None
        if limit is not None and changes:
            spread = Statistics(changes=changes).to_dict()["change"]
            seen = f"min {spread['min']:.3g}, median {spread['median']:.3g}, max {spread['max']:.3g}"
            if limit <= spread["min"]:
                return f"nothing was skipped: threshold {limit:g} is below every observed change ({seen})"
            return f"nothing was skipped: the smaller changes fell on protected steps (observed: {seen})"
        return "nothing was skipped: no step was left between the protected ones"

    def details(self, run: Run) -> Mapping[str, Any]:
        found = {name: ledger.statistics.to_dict() for name, ledger in self._ledgers(run).items()}
        return {**found, "decided": "rows apart" if self.recipe.per_row else "batch together"} if found else {}


def _noise_levels(clock: Clock) -> tuple[float, ...]:
    return () if clock.sigmas is None else tuple(clock.sigmas[: clock.total].tolist())


def join(pieces: list[Tensor | None]) -> Tensor | None:
    """Rows put together again; None where a stream is absent."""
    present = [x for x in pieces if x is not None]
    if len(present) < len(pieces):
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
