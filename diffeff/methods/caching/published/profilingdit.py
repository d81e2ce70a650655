"""ProfilingDiT: blocks that were profiled as background are reused, more rarely refreshed early than late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffeff.anatomy.types import DenoiserMap, Segment
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.errors import ConfigError
from diffeff.methods.caching.entries import falling
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.ranges import BlockSet
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["ProfilingDiT"]


@dataclass(frozen=True)
class _Refreshed(BlockSet):
    """The background blocks, refreshed at falling intervals."""

    warm_up: float = 0.12
    longest: float = 0.24
    shortest: float = 0.04

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """The steps at which everything is computed."""
        warm_up, longest, shortest = (
            max(round(share * clock.length), 1) for share in (self.warm_up, self.longest, self.shortest)
        )
        return falling(clock, warm_up, longest, shortest)


@dataclass(frozen=True, kw_only=True)
class ProfilingDiT(CacheConfig):
    """Blocks that a profile found to work on the background are skipped at most steps; all others always run.

    After the share `warm_up` of the run, the blocks in `blocks` are computed only at refresh steps, whose distance
    falls from the share `longest` of the run to the share `shortest` at its end; in between, what each maximal run of
    them added to its input is added again. `blocks` is the profile, by index over the whole stack.

    Defaults: 50 steps are refreshed at 6, 18, 27, 34, 39, 43, 46, 48, which is the authors' table (6, 18, 26, 32, 38,
    42, 46, 48) to two steps.

    Differs: the authors segment the model's own predictions and count the attention that falls on the foreground;
    thresholds are not published. `diffeff.search.profiles.block_drift` ranks blocks by how much what they add drifts
    from step to step instead, and takes the steadiest. `PUBLISHED["wan-14b"]` is the authors' list for 40 blocks; the
    one for HunyuanVideo counts single-stream blocks only (add the number of double-stream blocks).

    Transformers only. Holds one residual per run of blocks, stream and branch.

    Source: ProfilingDiT, Model Reveals What to Cache (arXiv 2504.03140).
    """

    name: ClassVar[str] = "profilingdit"
    summary: ClassVar[str] = "Blocks profiled as background are skipped at most steps, all others always run."

    PUBLISHED: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "hunyuanvideo (single-stream blocks)": (0, 2, *range(4, 8), *range(10, 22), 23, *range(25, 28), 31, 33),
        "wan-14b": (0, *range(2, 8), *range(10, 21), *range(25, 33), 37, 38),
    }

    blocks: tuple[int, ...] = knob((), "blocks that are reused, by index over the whole stack", low=0)
    warm_up: float = knob(0.12, "share of the run in which everything is computed", low=0.0, high=1.0, step=0.01)
    longest: float = knob(0.24, "share of the run between refreshes, at first", low=0.0, high=1.0, step=0.01)
    shortest: float = knob(0.04, "share of the run between refreshes, at the end", low=0.0, high=1.0, step=0.01)

    def check(self) -> None:
        if self.shortest > self.longest:
            raise ConfigError(
                f"profilingdit.shortest is {self.shortest:g}; it must not exceed longest ({self.longest:g})"
            )

    def recipe(self) -> Recipe:
        missing = (
            "it has no profile of this model (blocks). Make one with "
            "diffeff.search.profiles.block_drift(pipe, job, config), or take one from ProfilingDiT.PUBLISHED."
        )
        site = _Refreshed(self.blocks, self.warm_up, self.longest, self.shortest)
        return Recipe(site, Interval(1), first=1, missing="" if self.blocks else missing)
