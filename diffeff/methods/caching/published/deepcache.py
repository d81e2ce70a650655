"""DeepCache: a UNet's deep part is computed at every n-th step, its outermost layers at all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffeff.anatomy.types import DenoiserMap, Segment
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.methods.caching.entries import centred, every
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.ranges import DepthOf
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["DeepCache"]


@dataclass(frozen=True)
class _Schedule(DepthOf):
    """The deep part, computed as the paper's two schedules say."""

    interval: int = 3
    uniform: bool = True
    centre: float = 0.3
    power: float = 1.4

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """Which entries of this run are computed."""
        if self.uniform:
            return every(clock, self.interval)
        return centred(clock, max(-(-clock.length // self.interval), 1), self.centre, self.power)


@dataclass(frozen=True, kw_only=True)
class DeepCache(CacheConfig):
    """The largest part of a UNet is skipped at two steps out of three (its authors report 1.7 to 2.6 times as fast).

    The feature map that enters the last layer of the up path (or the layer that `level` and `layer` choose) is kept at
    every `interval`-th step; the other steps compute only what lies outside it, with fresh skip connections. `level` 0
    and `layer` 0 are the outermost: almost nothing is computed. In the published count, branch b is level b // 3 and
    layer b % 3.

    `schedule="uniform"` counts from the run's first step. `"centred"` computes as many steps, but closer together
    around the share `centre` of the run and further apart away from it, as a power law: the idea of the paper's
    non-uniform form, for large intervals, not its formula to the letter (which the package does not offer).

    Defaults: interval 3 is what the package's documentation shows; `centre` and `power` are ours, to be tuned.

    Differs: unlike in that package, steps are entries of the scheduler's list, not places of a timestep value looked up
    in it, which goes wrong where values repeat (Heun, PNDM); nothing is read back from the device; and only one feature
    map per branch is held instead of the output of every module.

    UNets only, image and video; the motion modules of AnimateDiff inside the deep part are skipped with it.

    Memory: one feature map per branch.

    Source: DeepCache (arXiv 2312.00858).
    """

    name: ClassVar[str] = "deepcache"
    summary: ClassVar[str] = "A UNet's deep part is computed at every n-th step, its outer layers at all of them."

    interval: int = knob(3, "compute the deep part every n-th step; 1 is exact", low=1, high=20, step=1)
    level: int = knob(0, "outermost level that is always computed in part", low=0, step=1)
    layer: int = knob(0, "layers of that level that are always computed besides the last", low=0, step=1)
    schedule: Literal["uniform", "centred"] = knob("uniform", "how the computed steps are spread")
    centre: float = knob(0.3, "share of the run that gets most steps (centred)", low=0.0, high=1.0, step=0.05)
    power: float = knob(1.4, "how strongly they gather there (centred); 1 is uniform", low=1.0, high=3.0, step=0.1)

    def recipe(self) -> Recipe:
        uniform = self.schedule == "uniform"
        site = _Schedule(self.level, self.layer, self.interval, uniform, self.centre, self.power)
        return Recipe(site, Interval(self.interval), exact=self.interval == 1)
