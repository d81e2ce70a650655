"""DBCache: First-Block Cache with more blocks in front that decide, and blocks behind that correct."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.methods.caching.indicator import InputChange
from diffeff.methods.caching.policy import FirstOf, Mask, Policy, Quota, Threshold
from diffeff.methods.caching.predictor import PREDICTORS
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite

__all__ = ["DBCache"]

# Steps computed | predicted, for 28 steps.
_MASKS: Mapping[str, Mask] = MappingProxyType(
    {
        "slow": Mask((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3, 0)),
        "medium": Mask((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3, 0)),
        "fast": Mask((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4, 0)),
        "ultra": Mask((4, 1, 1, 1, 1), (2, 5, 6, 7, 0)),
    }
)


@dataclass(frozen=True, kw_only=True)
class DBCache(CacheConfig):
    """Skips the middle blocks: `head` blocks in front decide and `tail` blocks behind correct, both always computed.

    Rule: relative L1 change of the head blocks' residual against the last computed step below `threshold` -> the middle
    blocks' residual is predicted. More head blocks decide better and save less; tail blocks adapt the prediction to the
    present step, which also helps few-step models. `mask` protects steps by one of cache-dit's hand-made tables (28
    steps, stretched to the run).

    Differs: cache-dit counts transformer calls and tells branches by parity, keeps one decision per block list (two on
    FLUX), and must be told the number of steps; here the clock is the scheduler's, branches go by name, and the lists
    of a model are one stack.

    Defaults: cache-dit's, with at most `max_skips` in a row (its users' practice, 2 to 8).

    Memory: the head's and the middle's residual per branch, once more per order of the predictor.

    Source: DBCache (cache-dit 1.5.3).
    """

    name: ClassVar[str] = "dbcache"
    summary: ClassVar[str] = "Skips the middle blocks; the first ones decide, the last ones correct."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"flux": 0.08, "flux-fast": 0.12})

    head: int = knob(8, "first blocks, always computed, that decide", low=1, step=1)
    tail: int = knob(0, "last blocks, always computed, that correct", low=0, step=1)
    threshold: float = knob(0.08, "compute when the head blocks' residual has changed by this", low=0, high=10)
    predictor: Literal["hold", "linear", "quadratic", "taylor", "damped"] = knob(
        "hold", "how the middle blocks' residual is predicted"
    )
    mask: Literal["none", "slow", "medium", "fast", "ultra"] = knob("none", "table of steps that may be predicted")
    first: int = knob(8, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(4, "most steps predicted in a row; none: no limit", low=0, step=1)
    quota: int | None = knob(None, "most steps predicted in the run; none: no limit", low=0, step=1)

    def recipe(self) -> Recipe:
        rules: list[Policy] = [Threshold(self.threshold)]
        if self.mask != "none":
            rules.append(_MASKS[self.mask])
        if self.quota is not None:
            rules.append(Quota(self.quota))
        return Recipe(
            site=StackSite(head=self.head, tail=self.tail, look="residual"),
            policy=rules[0] if len(rules) == 1 else FirstOf(tuple(rules)),
            predictor=PREDICTORS[self.predictor],
            indicator=InputChange,
            first=self.first,
            last=self.last,
            cap=self.max_skips,
            exact=self.threshold == 0 or self.max_skips == 0 or self.quota == 0,
        )
