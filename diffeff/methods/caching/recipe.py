"""A cache as a recipe: where it predicts (site), when (policy over an indicator), and from what (predictor)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from diffeff.core.config import Config, knob
from diffeff.core.method import Method
from diffeff.core.run import Clock, Run
from diffeff.methods.caching.indicator import Indicator
from diffeff.methods.caching.policy import Cap, FirstOf, Opening, Policy, Window
from diffeff.methods.caching.predictor import AnyPredictor, Polynomial
from diffeff.methods.memory.budget import parse_bytes

__all__ = ["CacheConfig", "Recipe", "Site"]


class Site(Protocol):
    """A place of the denoiser whose output a cache can predict."""

    def build(self, config: CacheConfig, recipe: Recipe) -> Method[Any]:
        """The method that runs the recipe there."""


@dataclass(frozen=True)
class Recipe:
    """All that tells one published cache from another.

    `policy` decides between the `first` (and the share `warmup` of the run) and the `last` steps, which are always
    computed, and never lets more than `cap` steps in a row be predicted. `indicator` makes a fresh indicator per run
    and group of rows; it sees what `view` makes of what the site shows it. `feedback` lets predictions join the history
    that is predicted from. `exact` says that these options never skip anything: nothing is then measured or kept, and a
    run too short for them is no mistake. `missing` says which calibrated data these options lack and how to make them:
    binding is refused with it.
    `refusal` says why the recipe is wrong for the run on this clock; empty where it is not.
    """

    site: Site
    policy: Policy
    predictor: AnyPredictor = field(default_factory=lambda: Polynomial(0))
    indicator: Callable[[], Indicator] | None = None
    view: Callable[[Run, Tensor], Tensor] | None = None
    first: int = 0
    warmup: float = 0.0
    last: int = 0
    cap: int | None = None
    exact: bool = False
    per_row: bool = False
    feedback: bool = False
    missing: str = ""
    refusal: Callable[[Clock], str] | None = None

    def opening(self, length: int) -> int:
        """How many steps at the start of a run of `length` are always computed."""
        return max(self.first, Opening(self.warmup).steps(length))

    @property
    def rules(self) -> Policy:
        """The policy inside its guards."""
        guards: list[Policy] = [Window(self.first, self.last)]
        if self.warmup:
            guards.append(Opening(self.warmup))
        if self.cap is not None:
            guards.append(Cap(self.cap))
        return FirstOf((*guards, self.policy))


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Config):
    """Base of all caches: a config that says its recipe."""

    cache_memory: str = knob("", "most device memory for snapshots, such as 512MB; the rest waits in host memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_memory:
            parse_bytes(self.cache_memory)

    @property
    def cache_bytes(self) -> int | None:
        """`cache_memory` in bytes; None where it is not limited."""
        return parse_bytes(self.cache_memory) if self.cache_memory else None

    def recipe(self) -> Recipe:
        """What these options amount to."""
        raise TypeError(f"{type(self).__name__} has no recipe")

    def build(self) -> Method[Any]:
        recipe = self.recipe()
        return recipe.site.build(self, recipe)
