"""Foresight: each block is reused while it has changed less than it did when the run began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, Segment
from diffeff.core.config import knob
from diffeff.core.run import Clock, Run
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.policy import FirstOf, Opening, Policy, Threshold
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import SegmentCache
from diffeff.methods.caching.track import Track

__all__ = ["Foresight"]

_FORGET = 0.1
"""How much less an earlier step of the warm-up counts."""


_LEAST = 3
"""A change needs two steps, and a unit a change: the fewest steps of a warm-up."""


@dataclass(frozen=True, kw_only=True)
class Foresight(CacheConfig):
    """Blocks that change slowly for this prompt are reused, each by its own measure.

    The first share `warmup` of the run is computed. Meanwhile each block measures the mean square change of what it
    adds from step to step, the newest counting most (each older one a tenth): that is its unit. Afterwards every
    `interval`-th step is computed whole; at the steps between, a block is reused while its last measured change is
    below `threshold` of its unit, and computed (and measured anew) where it is not. So early blocks rest more than late
    ones, and quiet prompts more than busy ones, without calibration. One number per computed block is read back.

    Differs: the original reuses the output of a block; here what it adds to its input is reused, so that what the
    blocks before it have computed is not thrown away. A warm-up, thresholds per block in units of its changes, and
    whole steps at an interval are published. Inferred: how the warm-up's changes are weighted; that thresholds bound a
    block's last measured change. Ours: the protected `last` steps.

    Defaults: the authors' example: 5 steps of 30, every 2nd, 0.5.

    Transformers only. Holds one residual per block and branch, and another to compare with.

    Source: Foresight (arXiv 2506.00329).
    """

    name: ClassVar[str] = "foresight"
    summary: ClassVar[str] = "Each block is reused while it changes less than it did when the run began."

    threshold: float = knob(0.5, "reuse below this share of a block's early change; 0 is exact", low=0.0, step=0.05)
    interval: int = knob(2, "compute every block every n-th step; 1 is exact", low=1, high=16, step=1)
    warmup: float = knob(0.15, "share of the run that is computed and measured first", low=0.0, high=0.9, step=0.05)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        return Recipe(
            _EachBlock(self.interval, self.warmup, self.threshold),
            Threshold(self.threshold),
            first=_LEAST,
            warmup=self.warmup,
            last=self.last,
            exact=self.threshold == 0 or self.interval == 1,
        )


@dataclass(frozen=True)
class _EachBlock:
    """Every block as a run of its own."""

    interval: int
    warmup: float
    threshold: float

    def build(self, config: CacheConfig, recipe: Recipe) -> SegmentCache:
        return _ForesightMethod(config, recipe, self)

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """One segment per block."""
        if not denoiser.residual:
            return ()
        return tuple(denoiser.segment(block.index, block.index) for block in denoiser.blocks)

    def refusal(self, denoiser: DenoiserMap) -> str:
        """Blocks that change size have no sum that could be reused."""
        return f"{denoiser.name} is a UNet, whose blocks differ in shape; use deepcache there."

    def steps(self, clock: Clock) -> int:
        """Steps of the warm-up."""
        return max(Opening(self.warmup).steps(clock.length), _LEAST)

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """Every n-th step behind the warm-up is computed whole, whatever has changed."""
        begin = clock.first + self.steps(clock)
        whole = frozenset(i for i in range(begin, clock.total) if (i - begin) % self.interval == self.interval - 1)
        return FirstOf((Threshold(self.threshold), AtEntries(whole)))


@dataclass
class _OwnChange:
    """The last mean square change of what a block adds, in units of its warm-up."""

    warmup: int
    computations: int = 0
    unit: float = 0.0
    recent: float | None = None
    output: Tensor | None = None

    def change(self, x: Tensor) -> float | None:
        if self.recent is None:
            return None
        return self.recent / self.unit if self.unit else float("inf")

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        if output is None:
            return
        self.computations += 1
        if self.output is not None:
            self.recent = float((output.float() - self.output.float()).square().mean())
            if self.computations <= self.warmup:
                self.unit = _FORGET * self.unit + self.recent
        self.output = output


class _ForesightMethod(SegmentCache):
    """A segment cache whose blocks measure themselves."""

    site: _EachBlock
    skipped: ClassVar[str] = "steps' blocks"

    @property
    def decides(self) -> str:
        return "batch together"

    def _new_track(self, run: Run, segment: Segment, denoiser: DenoiserMap) -> Track:
        track = super()._new_track(run, segment, denoiser)
        track.indicator = _OwnChange(self.site.steps(run.clock))
        return track
