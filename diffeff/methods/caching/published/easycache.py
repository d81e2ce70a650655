"""EasyCache: whole steps are skipped while the latents say that the output has hardly moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.methods.caching.indicator import TransformRate
from diffeff.methods.caching.policy import Threshold
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["EasyCache"]


@dataclass(frozen=True, kw_only=True)
class EasyCache(CacheConfig):
    """Skips whole denoiser calls, on any model, without calibration; what is held is the output less its input.

    Rule: how far the output moves per movement of the latents is measured over the last two computed steps and taken to
    hold on; each step adds its estimated relative change of the output, and the denoiser is called when the sum reaches
    `threshold`. The decision needs the latents alone and falls before the call.

    Differs: the published code divides the change of the output between computed steps by the change of the input over
    the last step alone, so that its rate grows with every skipped step; here both span the same two steps.

    Defaults: the authors' for 50 steps (10 computed at the start). Where a model predicts noise rather than a velocity,
    or more channels than the latents have, `relative=False` holds the output itself.

    Memory: four latents per branch. Reads one number back per step.

    Source: EasyCache (arXiv 2507.02860).
    """

    name: ClassVar[str] = "easycache"
    summary: ClassVar[str] = "Skips whole denoiser calls while the latents say that the output hardly moves."
    PUBLISHED: ClassVar[Mapping[str, float]] = MappingProxyType({"wan": 0.05, "hunyuanvideo": 0.025})

    threshold: float = knob(0.05, "compute when the estimated relative change reaches this", low=0, high=10)
    relative: bool = knob(True, "hold the output less the latents it came from, not the output")
    warmup: float = knob(0.2, "share of the run, at its start, that is always computed", low=0, high=1, step=0.05)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(None, "most steps predicted in a row; none: no limit", low=0, step=1)
    per_row: bool = knob(False, "let every image or video of a batch decide apart")

    def recipe(self) -> Recipe:
        return Recipe(
            site=StepSite(relative=self.relative),
            policy=Threshold(self.threshold),
            indicator=TransformRate,
            first=2,
            warmup=self.warmup,
            last=self.last,
            cap=self.max_skips,
            exact=self.threshold == 0 or self.max_skips == 0,
            per_row=self.per_row,
        )
