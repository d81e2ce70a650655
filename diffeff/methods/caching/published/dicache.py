"""DiCache: a probe of the first blocks decides, and says how far along the last residuals the step has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.methods.caching.indicator import Accumulated
from diffeff.methods.caching.informed import ProbeAligned
from diffeff.methods.caching.policy import Threshold
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite

__all__ = ["DiCache"]


@dataclass(frozen=True, kw_only=True)
class DiCache(CacheConfig):
    """Skips the blocks behind the first `head` ones, and lets what these add steer the prediction.

    Rule: relative L1 changes of the image stream behind the head blocks, from step to step, are summed since the last
    computed one; below `threshold` the rest is predicted as r_b + gamma (r_a - r_b) from its last two residuals a, b,
    with gamma the way the head's residual has gone on that line, kept to 1 .. `reach`.

    Differs: the published form adds the residual of the whole stack to its input; here that of the other blocks is
    added to what the head has just computed, so that nothing computed is thrown away.

    Defaults: the authors' for Wan.

    Memory: two residuals of the rest and of the head per branch. Reads two pairs of numbers back per skipped step.

    Source: DiCache (arXiv 2508.17356).
    """

    name: ClassVar[str] = "dicache"
    summary: ClassVar[str] = "Skips all but the first blocks, whose probe decides and steers the prediction."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"wan": 0.2, "hunyuanvideo": 0.1, "flux": 0.4})

    threshold: float = knob(0.2, "compute when the summed change behind the head blocks reaches this", low=0, high=100)
    head: int = knob(1, "first blocks, always computed: the probe", low=1, step=1)
    reach: float = knob(1.5, "furthest extrapolation along the last two residuals; 1 holds", low=1, high=4)
    warmup: float = knob(0.2, "share of the run, at its start, that is always computed", low=0, high=1, step=0.05)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(None, "most steps predicted in a row; none: no limit", low=0, step=1)

    def recipe(self) -> Recipe:
        return Recipe(
            site=StackSite(head=self.head, look="state", probe=True),
            policy=Threshold(self.threshold),
            predictor=ProbeAligned(1.0, self.reach),
            indicator=Accumulated,
            first=1,
            warmup=self.warmup,
            last=self.last,
            cap=self.max_skips,
            exact=self.threshold == 0 or self.max_skips == 0,
        )
