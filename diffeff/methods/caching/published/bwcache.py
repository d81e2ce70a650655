"""BWCache: where all blocks have stopped moving, the next few steps are skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.methods.caching.indicator import Drift
from diffeff.methods.caching.policy import Burst, FirstOf, TailGuard, Threshold
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite

__all__ = ["BWCache"]


@dataclass(frozen=True, kw_only=True)
class BWCache(CacheConfig):
    """Skips the block stack for a burst of steps once the outputs of its blocks have stopped drifting.

    Rule: at computed steps, the relative L1 change of block outputs against the computed step before, averaged over
    blocks; below `threshold`, the stack is skipped for the next `burst` of the run's steps, then computed once and
    asked again. Counted from the first skipped step, the last `tail` of the remaining run is computed.

    Differs: the published form reads off all blocks and keeps all their outputs; here `blocks` of them, evenly spaced,
    are read (the last always), and what is held is the stack's residual, which follows the present input. The authors'
    code was not at hand: the rule is the paper's.

    Defaults: the authors' thresholds are 0.15 (slow), 0.20, 0.25.

    Memory: one residual per stream and branch, and the read blocks' outputs of one branch.

    Source: BWCache (arXiv 2509.13789).
    """

    name: ClassVar[str] = "bwcache"
    summary: ClassVar[str] = "Skips bursts of steps once the outputs of the blocks have stopped drifting."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"slow": 0.15, "medium": 0.2, "fast": 0.25})

    threshold: float = knob(0.15, "skip a burst where the outputs drift less than this", low=0, high=10)
    burst: float = knob(0.1, "share of the run's steps that is skipped in a row", low=0, high=1)
    tail: float = knob(0.5, "share of the run behind the first skipped step that is computed at its end", low=0, high=1)
    blocks: int = knob(4, "blocks whose outputs are read", low=1, step=1)
    first: int = knob(2, "first steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        return Recipe(
            site=StackSite(head=0, look="state", tapped=self.blocks),
            policy=FirstOf((Threshold(self.threshold), Burst(self.burst), TailGuard(self.tail))),
            indicator=Drift,
            first=self.first,
            last=1,
            exact=self.threshold == 0,
        )
