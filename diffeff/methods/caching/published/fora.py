"""FORA: every attention and feed-forward output is reused for a fixed number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.methods.caching.module_cache import MODULES, Modules
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["FORA"]


@dataclass(frozen=True, kw_only=True)
class FORA(CacheConfig):
    """Only embeddings, norms and gates are computed at two steps out of three: module outputs are reused.

    All attention and feed-forward outputs are computed at every `interval`-th step and repeated in between; gates and
    modulation still follow the present step, which is what sets it apart from repeating a whole block.

    Defaults: the interval is the paper's. It publishes no protected steps: `first` is 1 and `last` is 0.

    Differs: histories are kept apart by guidance branch; the rule is the published one.

    Holds one output per module and branch (2 to 3 per block); on large video models that is tens of gigabytes.

    Source: FORA, Fast-Forward Caching (arXiv 2407.01425).
    """

    name: ClassVar[str] = "fora"
    summary: ClassVar[str] = "All attention and feed-forward outputs are reused for a fixed number of steps."

    interval: int = knob(3, "compute every n-th step; 1 is exact", low=1, high=16, step=1)
    first: int = knob(1, "first steps that are always computed", low=1, step=1)
    last: int = knob(0, "last steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        exact = self.interval == 1
        return Recipe(Modules(MODULES), Interval(self.interval), first=self.first, last=self.last, exact=exact)
