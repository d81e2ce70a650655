"""Spectrum: a ridge fit of Chebyshev polynomials to what was computed forecasts the steps between, ever further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.methods.caching.policy import GrowingWindow
from diffeff.methods.caching.predictor import Blend, Chebyshev, Polynomial
from diffeff.methods.caching.recipe import CacheConfig, Recipe, Site
from diffeff.methods.caching.stack_cache import StackSite
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["Spectrum"]


@dataclass(frozen=True, kw_only=True)
class Spectrum(CacheConfig):
    """Forecasts the block stack's residual from all of its past, computing more and more rarely.

    Rule: after `first` steps every n-th is computed, with n = `window` plus `growth` for each one computed since (50
    steps: 14 computed). Steps between are `blend` of a ridge fit of Chebyshev polynomials of degree `order` to the last
    `history` snapshots, and the rest of a line through the last two. Nothing is measured or read back.

    Differs: the published fit also shrinks the constant term: it predicts 0.83 to 0.90 of a constant. Here moves from
    the newest snapshot are fitted, so that constants are exact.

    Defaults: the authors', but for `history`: they keep up to 100 snapshots, and 8 hold a fit of degree 4.

    Memory: `history` residuals per stream and branch. `site="step"` keeps outputs instead, for any model.

    Source: Spectrum (arXiv 2603.01623).
    """

    name: ClassVar[str] = "spectrum"
    summary: ClassVar[str] = "Forecasts features from all of their past, computing more and more rarely."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"flux": 0.75, "wan": 0.75})
    """growth"""

    site: Literal["stack", "step"] = knob("stack", "what is forecast: the block stack's residual, or the output")
    window: float = knob(2.0, "compute every n-th step, at first; 1 with growth 0 is exact", low=1, high=16)
    growth: float = knob(0.75, "by how much n grows with every computed step", low=0, high=4)
    order: int = knob(4, "degree of the fit", low=1, high=8, step=1)
    ridge: float = knob(0.1, "how strongly the fit is held back", low=0, high=100)
    history: int = knob(8, "snapshots that are kept and fitted", low=2, high=100, step=1)
    blend: float = knob(0.5, "share of the fit; the rest is a line through the last two", low=0, high=1)
    first: int = knob(5, "first steps that are always computed", low=1, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        site: Site = StackSite(head=0) if self.site == "stack" else StepSite()
        return Recipe(
            site=site,
            policy=GrowingWindow(self.first, self.window, self.growth),
            predictor=Blend(Chebyshev(self.order, self.ridge, self.history), Polynomial(1), self.blend),
            first=self.first,
            last=self.last,
            exact=self.window < 2 and self.growth == 0,
        )
