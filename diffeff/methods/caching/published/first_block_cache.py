"""First-Block Cache: the first block tells whether the others are worth computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.methods.caching.indicator import InputChange
from diffeff.methods.caching.policy import Threshold
from diffeff.methods.caching.predictor import PREDICTORS
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite

__all__ = ["FirstBlockCache"]


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(CacheConfig):
    """Skips all blocks but the first where what the first adds has hardly changed since the last computed step.

    Rule: relative L1 change of the first block's residual (image stream) against the last computed step below
    `threshold` -> the other blocks' residuals, image and text, are predicted. Reads one pair of numbers back per step.

    Differs: the published form protects no step: it can skip the last ones, skips without end where the change stays
    small, and keeps its residuals after an interrupted run. Here the first and last steps are computed, at most
    `max_skips` are skipped in a row, all branches of a step follow one decision, and state ends with the run. `first=1,
    last=0, max_skips=None` makes diffusers' decisions (tested on one branch).

    Defaults: the threshold is ParaAttention's for video; diffusers' is 0.05. PUBLISHED has the values in use by family.

    Memory: two residuals per branch (the first block's and the others'), and the text stream's where there is one.

    Source: First-Block Cache (ParaAttention 0.3; diffusers FirstBlockCacheConfig).
    """

    name: ClassVar[str] = "first_block_cache"
    summary: ClassVar[str] = "Skips the blocks behind the first where the first one's contribution hardly changes."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"flux": 0.08, "hunyuanvideo": 0.1, "wan": 0.1})

    threshold: float = knob(0.1, "compute when the first block's residual has changed by this", low=0, high=10)
    predictor: Literal["hold", "linear", "damped"] = knob("hold", "how the other blocks' residual is predicted")
    first: int = knob(3, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(4, "most steps predicted in a row; none: no limit", low=0, step=1)

    def recipe(self) -> Recipe:
        return Recipe(
            site=StackSite(head=1, look="residual"),
            policy=Threshold(self.threshold),
            predictor=PREDICTORS[self.predictor],
            indicator=InputChange,
            first=self.first,
            last=self.last,
            cap=self.max_skips,
            exact=self.threshold == 0 or self.max_skips == 0,
        )
