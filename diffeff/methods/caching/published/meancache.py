"""MeanCache: skipped steps go on with the mean velocity of a stretch of the path, at calibrated steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.errors import ConfigError
from diffeff.methods.caching.informed import MeanVelocity
from diffeff.methods.caching.policy import AtSigmas
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.spectral import is_flow
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["MeanCache", "no_velocities"]

_MISSING = (
    "it has no table of steps for this model. Make one with one run: "
    "diffeff.search.calibration.calibrate(pipe, job, MeanCache(computed=12))."
)


def no_velocities(clock: Clock) -> str:
    """Why mean velocities mean nothing on this clock; empty where they do."""
    instead = "Use spectrum or taylorseer (site='step'), which carry on whatever the model predicts."
    if not is_flow(clock):
        return (
            "it carries on velocities along the noise level, and this scheduler is none of flow matching: its model "
            f"predicts noise, data or a mixture of both. {instead}"
        )
    levels = [] if clock.sigmas is None else clock.sigmas[: clock.total].tolist()
    if any(b >= a for a, b in pairwise(levels)):
        return (
            f"its mean velocities need noise levels that fall at every call, and this scheduler repeats some. {instead}"
        )
    return ""


@dataclass(frozen=True, kw_only=True)
class MeanCache(CacheConfig):
    """Skips whole denoiser calls of flow-matching models by a table that was searched on the model.

    Rule: the denoiser is called at the noise levels `sigmas` alone. In between, the velocity is the last used one,
    carried on by how the mean velocity over the last `spans[n]` steps turns (a span of 1 holds). Predicted velocities
    count as used ones. The calibration chooses levels and spans together: the path of `computed` calls with the least
    sum of errors to the power `gamma`, exactly, by dynamic programming.

    Differs: the published form works on the guided velocity; as all of it is linear, each branch apart gives the same,
    and guidance may change with the step. Mean velocities are those of Euler steps; other solvers take them as
    velocities. Schedules of other than flow matching are refused (MethodInapplicable): what is predicted there is no
    velocity.

    Defaults: gamma is the paper's best of 1, 2, 4 and 5; 12 calls are what it makes on HunyuanVideo.

    Memory: as many latents per branch as the longest span. Nothing is read back.

    Source: MeanCache (arXiv 2601.19961).
    """

    name: ClassVar[str] = "meancache"
    summary: ClassVar[str] = "Calls the denoiser at calibrated steps and goes on with mean velocities between them."
    PUBLISHED: ClassVar[Mapping[str, tuple[int, ...]]] = MappingProxyType(
        {"flux": (15, 10), "qwen-image": (25, 17, 13, 10), "hunyuanvideo": (12, 10)}
    )
    """Calls out of 50 steps, slow to fast."""

    computed: int = knob(12, "denoiser calls that a calibration chooses", low=2, step=1)
    gamma: float = knob(5.0, "how much the calibration avoids single large errors", low=1, high=16)
    sigmas: tuple[float, ...] = knob((), "noise levels at which the denoiser is called, falling (calibrated)")
    spans: tuple[int, ...] = knob((), "steps to look back on after each of them (calibrated)", low=1)

    def check(self) -> None:
        if len(self.sigmas) != len(self.spans) or list(self.sigmas) != sorted(self.sigmas, reverse=True):
            raise ConfigError(
                f"meancache.sigmas has {len(self.sigmas)} values and meancache.spans {len(self.spans)}; allowed: one "
                "span for each noise level, levels falling"
            )

    def recipe(self) -> Recipe:
        return Recipe(
            site=StepSite(),
            policy=AtSigmas(self.sigmas),
            predictor=MeanVelocity(self.sigmas, self.spans),
            first=1,
            feedback=True,
            missing="" if self.sigmas else _MISSING,
            refusal=no_velocities,
        )
