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
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.few_steps import caution, refuse_protected
from diffeff.methods.caching.policy import Action, Threshold
from diffeff.methods.caching.predictor import time_axis
from diffeff.methods.caching.ranks import Ranks, ranks_of
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.track import Moment, Part, Statistics, Track
from diffeff.methods.caching.vault import HostMemory, Shelf, Vault

__all__ = ["CacheMethod", "Ledger", "join"]


@dataclass
class Ledger:
    """What the cache of one site remembers in one run: tracks by group of rows."""

    tracks: dict[int, Track] = field(default_factory=dict)
    sizes: set[torch.Size] = field(default_factory=set)
    """Sizes at which a segment was computed: stand-ins for skipped UNet blocks need one computed at their size."""
    statistics: Statistics = field(default_factory=Statistics)
    vault: Vault | None = None
    ranks: Ranks | None = None

    def add(self, group: int, track: Track) -> Track:
        """Take a track in, under the run's budget of bytes and the decisions of all ranks."""
        track.vault, track.ranks = self.vault, track.ranks or self.ranks
        self.tracks[group] = track
        return track

    def weigh(self) -> None:
        """Note what is held now, for the report's peak."""
        held = sum(track.bytes_held() for track in self.tracks.values())
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, held)


class CacheMethod(Method[CacheConfig]):
    """Runs a recipe; each site says what is observed and what stands in."""

    skipped: ClassVar[str] = "steps"
    """What the report calls what was predicted."""
    shelf: ClassVar[Shelf] = HostMemory()
    """Where snapshots go that exceed `cache_memory`."""

    def __init__(self, config: CacheConfig, recipe: Recipe) -> None:
        super().__init__(config)
        self.recipe = recipe

    @property
    def decides(self) -> str:
        """For whom one decision is made: by the table or the clock alone, for the whole batch, or for each row."""
        if self.recipe.indicator is None:
            return "beforehand"
        return "rows apart" if self.recipe.per_row else "batch together"

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if self.recipe.missing:
            raise MethodInapplicable(f"{self.config.name}: {self.recipe.missing}")

    def begin(self, run: Run) -> None:
        recipe, length = self.recipe, run.clock.length
        reason = "" if recipe.refusal is None else recipe.refusal(run.clock)
        if reason:
            raise MethodInapplicable(f"{self.config.name}: {reason}")
        if not recipe.exact:
            refuse_protected(self.config.name, length, recipe.opening(length), recipe.last)
            caution(run)

    def end(self, run: Run, error: BaseException | None) -> None:
        vault = self._vault(run)
        if vault is not None and vault.excess and error is None:
            run.warn(f"{self.config.name}: {vault.excess}")

    def _ledger(self, run: Run, site: str) -> Ledger:
        return run.state(self, lambda: Ledger(vault=self._vault(run), ranks=self._ranks(run)), site=site, branch="")

    def _vault(self, run: Run) -> Vault | None:
        """What keeps this cache within its budget in this run; None without one."""
        budget = self.config.cache_bytes
        return None if budget is None else run.state(self, lambda: Vault(budget, self.shelf), "vault", "")

    def _ranks(self, run: Run) -> Ranks | None:
        """The processes that must decide like this one; None where nothing that is measured decides."""
        return None if self.recipe.indicator is None or run.call is None else self._sharing(run, run.call.denoiser)

    def _sharing(self, run: Run, denoiser: DenoiserMap) -> Ranks | None:
        """The processes that share calls of the denoiser out."""
        return run.state(self, lambda: ranks_of(denoiser.module), f"ranks {denoiser.name}", "")

    def _track(self, ledger: Ledger, group: int) -> Track:
        if group not in ledger.tracks:
            recipe = self.recipe
            indicator = None if recipe.indicator is None else recipe.indicator()
            ledger.add(group, Track(recipe.rules, recipe.predictor, indicator, recipe.feedback))
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

    def _only_counted(self, ledger: Ledger, parts: list[Part], at: Moment) -> bool:
        """Whether these options never skip anything: the call is then counted, nothing measured or kept for it."""
        if self.recipe.exact:
            self._count(ledger.statistics, parts, parts, at)
        return self.recipe.exact

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
        return {**found, "decided": self.decides, **self._memory(run)} if found else {}

    def _memory(self, run: Run) -> Mapping[str, Any]:
        """What the budget of bytes came to, where there is one."""
        vault = self._vault(run)
        return {} if vault is None else {"memory": vault.to_dict()}


def _noise_levels(clock: Clock) -> tuple[float, ...]:
    return () if clock.sigmas is None else tuple(clock.sigmas[: clock.total].tolist())


def join(pieces: list[Tensor | None]) -> Tensor | None:
    """Rows put together again; None where a stream is absent."""
    present = [x for x in pieces if x is not None]
    if len(present) < len(pieces):
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
