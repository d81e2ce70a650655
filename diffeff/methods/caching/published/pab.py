"""PAB: attention outputs are broadcast to the next steps, each kind of attention at its own interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffeff.anatomy.types import ModuleSite
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.errors import ConfigError
from diffeff.methods.caching.entries import every, within
from diffeff.methods.caching.module_cache import MODULES, Modules
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["PAB"]


@dataclass(frozen=True, kw_only=True)
class PAB(CacheConfig):
    """Pyramid Attention Broadcast: most attention of a video model is skipped in the middle of the run.

    While the timestep lies between `low` and `high`, attention is computed at every `spatial`-th step of the run (self
    and joint attention), every `temporal`-th and every `cross`-th; its last output stands in between, before gate and
    residual sum. Outside that window everything is computed. An interval of 1 leaves a kind alone.

    Defaults: diffusers' (spatial 2, window 100 to 800), with the published intervals of Latte for the other kinds.
    Schedulers whose timesteps are not on the scale 1000 to 0 get the run's progress on it.

    Differs: unlike with diffusers' hook, outputs are kept apart by guidance branch: there, a model that is called once
    per branch (Wan) counts every call as a step, and one branch is given the other's attention. The timestep comes from
    the scheduler, so no callback has to be passed. The authors' table of feed-forward blocks is one interval,
    `feed_forward`, for all.

    Holds one output per attention and branch: the memory of a whole forward pass of those modules.

    Source: Pyramid Attention Broadcast (arXiv 2408.12588).
    """

    name: ClassVar[str] = "pab"
    summary: ClassVar[str] = "Attention outputs are reused over the next steps, each kind at its own interval."

    PUBLISHED: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "open_sora": {"spatial": 2, "temporal": 4, "cross": 6, "low": 450, "high": 930},
        "latte": {"spatial": 2, "temporal": 3, "cross": 6, "low": 100, "high": 800},
        "cogvideox": {"spatial": 2, "temporal": 1, "cross": 1, "low": 100, "high": 850},
    }

    spatial: int = knob(2, "compute self and joint attention every n-th step", low=1, high=16, step=1)
    temporal: int = knob(3, "compute temporal attention every n-th step", low=1, high=16, step=1)
    cross: int = knob(6, "compute cross attention every n-th step", low=1, high=16, step=1)
    feed_forward: int = knob(1, "compute feed-forward modules every n-th step", low=1, high=16, step=1)
    low: float = knob(100.0, "lowest timestep (0 to 1000) at which outputs are reused", high=1000.0, step=10)
    high: float = knob(800.0, "highest timestep (0 to 1000) at which outputs are reused", high=2000.0, step=10)

    def check(self) -> None:
        if self.high <= self.low:
            raise ConfigError(f"pab.high is {self.high:g}; it must be greater than low ({self.low:g})")

    @property
    def intervals(self) -> dict[str, int]:
        """Interval by kind of module."""
        own = {"temporal": self.temporal, "cross": self.cross, "feed_forward": self.feed_forward}
        return {"self": self.spatial, "joint": self.spatial} | own

    def _rule(self, site: ModuleSite, clock: Clock) -> Policy:
        return every(clock, self.intervals[site.kind], within(clock, self.low, self.high))

    def recipe(self) -> Recipe:
        kinds = tuple(kind for kind in MODULES if self.intervals[kind] > 1)
        exact = not kinds
        return Recipe(Modules(kinds or MODULES, rule=self._rule), Interval(1), exact=exact)
