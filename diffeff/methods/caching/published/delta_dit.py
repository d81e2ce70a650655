"""Delta-DiT: rear blocks are reused while the outline forms, front blocks while details do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.ranges import EndsByStage
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["DeltaDiT"]


@dataclass(frozen=True, kw_only=True)
class DeltaDiT(CacheConfig):
    """The part of the blocks that matters less at this stage of the run is skipped at every second step.

    Front blocks make the outline, rear blocks the details. So up to the share `gate` of the run, what the rear share
    `blocks` of the stack adds to its input is reused; afterwards what the front share adds. Every `interval`-th step is
    computed whole.

    Defaults: the paper has no code. Interval 2 is the mildest it is compared at; the share of the blocks and of the run
    at which stages change are ours.

    Differs: with more than half of the blocks both ends overlap: what they share is kept as a run of its own (residuals
    add up), so that nothing has to be computed twice where stages change.

    Transformers only. Holds up to three residuals per stream and branch.

    Source: Delta-DiT (arXiv 2406.01125).
    """

    name: ClassVar[str] = "delta_dit"
    summary: ClassVar[str] = "Rear blocks are reused early in the run, front blocks later on."

    interval: int = knob(2, "compute every n-th step; 1 is exact", low=1, high=16, step=1)
    blocks: float = knob(0.75, "share of the blocks that is reused", low=0.05, high=0.95, step=0.05)
    gate: float = knob(0.5, "share of the run after which front blocks are reused", low=0.0, high=1.0, step=0.05)
    first: int = knob(1, "first steps that are always computed", low=1, step=1)
    last: int = knob(0, "last steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        site = EndsByStage(self.blocks, self.gate, self.interval)
        exact = self.interval == 1
        return Recipe(site, Interval(self.interval), first=self.first, last=self.last, exact=exact)
