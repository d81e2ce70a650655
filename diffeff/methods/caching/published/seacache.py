"""SeaCache: how far the signal in the latents has moved decides, the noise filtered out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.errors import ConfigError
from diffeff.methods.caching.indicator import Accumulated
from diffeff.methods.caching.policy import Threshold
from diffeff.methods.caching.predictor import PREDICTORS
from diffeff.methods.caching.recipe import CacheConfig, Recipe, Site
from diffeff.methods.caching.spectral import SignalView
from diffeff.methods.caching.stack_cache import StackSite
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["SeaCache"]


@dataclass(frozen=True, kw_only=True)
class SeaCache(CacheConfig):
    """Skips the block stack (or whole calls) while the signal in the latents hardly moves; no calibration.

    Rule: latents go through the Wiener filter for data with a spectrum |f|^-power at the present noise level; relative
    L1 changes of that from step to step are summed since the last computed one, and the stack is computed when the sum
    reaches `threshold`. The decision needs the latents alone and falls before the blocks.

    Differs: in diffusers 0.42 the filter gets its noise level from the few pipelines that pass one (Cosmos 3, Wan text
    to video), so that SeaCache never skips elsewhere. Here it comes from the clock, for every scheduler that has noise
    levels (flow matching, or variance preserving by the ratio of noise to data); decisions on Wan are diffusers'
    (tested). `predictor` extrapolates over the noise level, not over step numbers. The paper filters the modulated
    input; latents cost a small FFT instead of a part of the model.

    Defaults: diffusers'.

    `site="step"` predicts the denoiser's output instead, which also serves UNets.

    Memory: two residuals per stream and branch (linear; one when held), two latents.

    Source: SeaCache (arXiv 2602.18993).
    """

    name: ClassVar[str] = "seacache"
    summary: ClassVar[str] = "Skips while the signal in the latents, noise filtered out, hardly moves."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"flux": 0.3, "flux-fast": 0.6})

    site: Literal["stack", "step"] = knob("stack", "what is predicted: the block stack's residual, or the output")
    threshold: float = knob(0.25, "compute when the summed change reaches this", low=0, high=100)
    power: float = knob(3.0, "how steeply data falls off with frequency: 3 for video, 2 for images", low=0.1, high=10)
    predictor: Literal["hold", "linear", "damped"] = knob("linear", "how what is skipped is predicted")
    first: int = knob(1, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(2, "most steps predicted in a row; none: no limit", low=0, step=1)
    per_row: bool = knob(False, "let every image or video of a batch decide apart (step site only)")

    def check(self) -> None:
        if self.per_row and self.site == "stack":
            raise ConfigError(
                "seacache.per_row is True at site='stack': the rows of a batch go through the blocks together and "
                "cannot be skipped apart. Use per_row=True with site='step', or batches of one."
            )

    def recipe(self) -> Recipe:
        site: Site = StackSite(head=0, look="latents") if self.site == "stack" else StepSite()
        return Recipe(
            site=site,
            policy=Threshold(self.threshold),
            predictor=PREDICTORS[self.predictor],
            indicator=Accumulated,
            view=SignalView(self.power),
            first=self.first,
            last=self.last,
            cap=self.max_skips,
            exact=self.threshold == 0 or self.max_skips == 0,
            per_row=self.per_row,
        )
