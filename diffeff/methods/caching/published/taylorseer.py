"""TaylorSeer: features are extrapolated between steps computed at a fixed interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.methods.caching.module_cache import MODULES, Modules
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.predictor import Polynomial, Taylor
from diffeff.methods.caching.recipe import CacheConfig, Recipe, Site
from diffeff.methods.caching.stack_cache import StackSite
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["TaylorSeer"]


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(CacheConfig):
    """Computes every `interval`-th step and extrapolates features in between. No step is measured, nothing read back.

    Differs: the published form extrapolates the output of every attention and feed-forward module and holds `order` + 1
    of each (24 to 33 GB on HunyuanVideo); extrapolating the residual of the whole stack keeps as much quality (measured
    by Spectrum, DPCache and L2P) and holds as many residuals, so `site="stack"` is the default; `"modules"` is the
    published site, `"step"` the denoiser's output, for any model.

    Also, the published sum D_i k^i / i! does not reproduce polynomials of degree 2 and above: it is damped there.
    `form= "newton"` is exact on them, over noise levels; `"taylor"` is the published form, over step numbers, and the
    steadier of the two at high orders. diffusers' lite mode needs a layer called proj_out and blocks that return zeros;
    here the residual is the same for every transformer.

    Defaults: diffusers' interval 5 is for 50 steps; 4 is the paper's.

    Memory: `order` + 1 residuals per stream and branch; of every module with `site="modules"`, latents with `"step"`.

    Source: TaylorSeer (arXiv 2503.06923).
    """

    name: ClassVar[str] = "taylorseer"
    summary: ClassVar[str] = "Computes every n-th step and extrapolates features in between."
    PUBLISHED: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType({"flux": (4, 2), "hunyuanvideo": (5, 1)})
    """interval and order"""

    interval: int = knob(4, "compute every n-th step; 1 is exact", low=1, high=16, step=1)
    order: int = knob(1, "of the extrapolation; 0 holds", low=0, high=4, step=1)
    form: Literal["newton", "taylor"] = knob("newton", "exact on polynomials, or the published damped sum")
    site: Literal["stack", "modules", "step"] = knob("stack", "what is extrapolated")
    first: int = knob(3, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        sites: dict[str, Site] = {"stack": StackSite(head=0), "modules": Modules(MODULES), "step": StepSite()}
        return Recipe(
            site=sites[self.site],
            policy=Interval(self.interval),
            predictor=Polynomial(self.order) if self.form == "newton" else Taylor(self.order),
            first=self.first,
            last=self.last,
            exact=self.interval == 1,
        )
