"""HarmoniCa: which module is computed at which step was learned beforehand, against the error of the final image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffeff.anatomy.types import DenoiserMap, ModuleSite
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.module_cache import MODULES, ModuleCache, Modules
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.predictor import time_axis
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["HarmoniCa"]

_TRAIN = "diffeff train-router MODEL -o plan.json (or diffeff.search.router.train_router)"


@dataclass(frozen=True, kw_only=True)
class HarmoniCa(CacheConfig):
    """Every attention and feed-forward module is computed at steps of its own, learned on your model without data.

    `router` is a table: a word per step, in it a digit per name in `sites`, 1 to compute the module and 0 to repeat
    what it put out when it was last computed. A name may also be a kind (self, cross, joint, temporal, feed_forward),
    for all modules of that kind that are not named themselves. Gates and modulation follow the present step. The first
    step of a run is always computed. `times` are the noise levels of the rows: a run of another length, or one that
    starts late, takes for each of its steps the row next to it in noise, so that the table serves there too, at a loss
    that should be measured.

    There is no table to start from. Train one: `diffeff train-router MODEL -o plan.json`, minutes on a CPU for the
    bundled models. It belongs to one model, scheduler and resolution; what is decided does not depend on the prompt, so
    that all ranks agree and nothing is read back from the device.

    Differs: rows of the table go by noise level, so that it serves at other numbers of steps.

    Defaults: none acts before a table is trained.

    `note` says how the table was made. Holds one output per module and branch (2 or 3 per block); on large video models
    that is tens of gigabytes. Where attention and feed-forward are fused in one layer (single-stream blocks of Flux),
    only the modules that stand alone are routed.

    Source: HarmoniCa (arXiv 2410.01723).
    """

    name: ClassVar[str] = "harmonica"
    summary: ClassVar[str] = "Each module is computed at steps that were learned for it on your model."

    sites: tuple[str, ...] = knob((), "modules that the digits are about, in the denoiser's order (trained)")
    times: tuple[float, ...] = knob((), "noise level (or index) of each row (trained)")
    router: tuple[str, ...] = knob((), "a word of 1 (compute) and 0 (repeat) per step, a digit per module (trained)")
    note: str = knob("", "how the table was made")

    def check(self) -> None:
        if len(self.times) != len(self.router):
            raise ConfigError(
                f"harmonica.times has {len(self.times)} noise levels for {len(self.router)} rows of router; it needs "
                f"one for each. Make them with {_TRAIN}."
            )
        for number, row in enumerate(self.router):
            if len(row) != len(self.sites) or set(row) - {"0", "1"}:
                raise ConfigError(
                    f"harmonica.router[{number}] is {row!r}; allowed: {len(self.sites)} digits of 0 and 1, one per site"
                )

    @property
    def share(self) -> float:
        """Modules computed of all, every module counted alike."""
        digits = "".join(self.router)
        return digits.count("1") / max(len(digits), 1)

    def row_of(self, clock: Clock) -> tuple[int, ...]:
        """The row for every entry of the run's timestep list: the nearest in noise."""
        times = np.asarray(self.times)
        return tuple(int(np.argmin(np.abs(times - at))) for at in time_axis(clock))

    def _rule(self, site: ModuleSite, clock: Clock) -> Policy:
        column = self.sites.index(site.name if site.name in self.sites else site.kind)
        rows = self.row_of(clock)
        return AtEntries(frozenset(entry for entry, row in enumerate(rows) if self.router[row][column] == "1"))

    def recipe(self) -> Recipe:
        return Recipe(
            Modules(MODULES, rule=self._rule),
            Interval(1),
            first=1,
            exact=bool(self.router) and all("0" not in row for row in self.router),
            missing="" if self.router else f"it has no router for this model. Train one: {_TRAIN}.",
        )

    def build(self) -> RoutedModules:
        return RoutedModules(self)


class RoutedModules(ModuleCache):
    """A module cache whose table must be about the modules that are there."""

    def __init__(self, config: HarmoniCa) -> None:
        super().__init__(config, config.recipe(), Modules(MODULES, rule=config._rule))
        self.options = config

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        super().bind(denoisers)
        columns = set(self.options.sites)
        for denoiser in denoisers:
            there = self.module_sites(denoiser)
            unrouted = [m.name for m in there if not {m.name, m.kind} & columns]
            strange = sorted(columns - {m.name for m in there} - set(MODULES))
            if unrouted or strange:
                raise MethodInapplicable(
                    f"harmonica: the router's {len(columns)} columns do not fit the {len(there)} modules of "
                    f"{denoiser.name}: {(unrouted or strange)[0]!r} is not in both. Train one for this model: {_TRAIN}."
                )
