"""FeatureCache: predict some denoiser calls, or a run of their blocks, from earlier steps instead of computing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.errors import ConfigError
from diffeff.methods.caching.grouped import GROUPED
from diffeff.methods.caching.indicator import InputChange, TransformRate
from diffeff.methods.caching.policy import Interval, Policy, Threshold
from diffeff.methods.caching.predictor import PREDICTORS, AnyPredictor, over
from diffeff.methods.caching.recipe import CacheConfig, Recipe, Site
from diffeff.methods.caching.segment_cache import SegmentSite
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["FeatureCache"]

_THRESHOLD_CAP = 4


@dataclass(frozen=True, kw_only=True)
class FeatureCache(CacheConfig):
    """Fewer denoiser evaluations: some steps are predicted from the steps before them.

    `site="step"` predicts the denoiser's output. It fits every model, saves the whole call and holds one or two
    latents per branch. `site="segment"` still runs the outer blocks on every step and predicts what the blocks between
    them add (transformers) or put out (the deep part of a UNet): it saves less per step and holds one or two feature
    maps per stream and branch, but follows the present latents and text, and what ControlNets add between blocks.

    `policy="interval"` computes every `interval`-th step. `policy="threshold"` computes when an indicator reaches
    `threshold`; a threshold of 0 never skips. At the step site the indicator is the estimated relative L1 change of
    the prediction since the last computed step (0.05 is 5 %), from the latents alone (transform rate). At the segment
    site it is the relative L1 change of the image stream that enters the segment against the last computed step. It
    reads a few numbers back from the device per step. The report gives the observed values, to choose a threshold by.

    `predictor="hold"` repeats the last computed prediction (step), residual or output (segment). `"linear"`,
    `"quadratic"` and `"cubic"` extrapolate the last two, three or four and hold as many in memory; `"damped"` goes half
    of linear's way. They are drawn over sigma (over the timestep or the index where sigmas repeat), or with
    `axis="index"` over the step's number, which suits long intervals and models that predict noise. `"taylor"`
    (TaylorSeer, order 2), `"hermite"` (HiCache) and `"chebyshev"` (Spectrum, with constants kept exact) are the
    published forms; `"foca"` continues the last slope, averaged with the one between computed steps, and was the
    nearest to the plain run where it was measured (docs/caching.md); `"adams_bashforth"` and `"bdf"` are multistep
    formulas on four snapshots; `"freqca"` (FreqCa) holds low frequencies and extrapolates high ones, `"low_band"`
    draws a parabola through low and a line through high ones. Sums are taken in float32.

    All guidance branches of a step follow one decision, each with its own history; so do all batch rows, unless
    `per_row`. Two experts (Wan 2.2) share nothing. `interval=1` is bit-exact. Useful from about 10 steps up; a run
    whose steps are all protected is refused (MethodInapplicable).

    Memory: as many latents (step) or feature maps (segment) per branch as the predictor draws on.

    Sources: First-Block Cache (ParaAttention), DeepCache (arXiv 2312.00858), EasyCache (arXiv 2507.02860), TaylorSeer
    (arXiv 2503.06923, order 1), FoCa (arXiv 2508.16211), FreqCa (arXiv 2510.08669).
    """

    name: ClassVar[str] = "feature_cache"
    summary: ClassVar[str] = "Fewer denoiser evaluations: some steps are predicted from the steps before them."

    site: Literal["step", "segment"] = knob("step", "what is predicted: the whole denoiser call, or its inner blocks")
    policy: Literal["interval", "threshold"] = knob("interval", "when to compute: every n-th step, or on change")
    interval: int = knob(2, "compute every n-th step (policy=interval); 1 is exact", low=1, high=16, step=1)
    threshold: float = knob(
        0.1, "compute when the change reaches this (policy=threshold); 0 is exact", low=0.0, high=10.0, step=0.01
    )
    predictor: Literal[
        "hold",
        "linear",
        "quadratic",
        "cubic",
        "damped",
        "taylor",
        "hermite",
        "chebyshev",
        "adams_bashforth",
        "bdf",
        "foca",
        "freqca",
        "low_band",
    ] = knob("linear", "repeat the last computed step, or extrapolate the last ones")
    axis: Literal["time", "index"] = knob("time", "what hold to damped are drawn over: sigma, or the step's number")
    first: int = knob(3, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(
        None, "most steps predicted in a row; none: interval - 1, and 4 with a threshold", low=0, step=1
    )
    head: int = knob(1, "first blocks always computed (segment site of transformers)", low=0, step=1)
    tail: int = knob(0, "last blocks always computed (segment site of transformers)", low=0, step=1)
    depth: int = knob(1, "outermost levels always computed (segment site of UNets)", low=1, step=1)
    per_row: bool = knob(False, "let every image or video of a batch decide apart (step site only)")

    def check(self) -> None:
        if self.per_row and self.site == "segment":
            raise ConfigError(
                "feature_cache.per_row is True at site='segment': the rows of a batch go through the blocks together "
                "and cannot be skipped apart. Use per_row=True with site='step', or batches of one."
            )

    def recipe(self) -> Recipe:
        whole = self.site == "step"
        by_interval = self.policy == "interval"
        site: Site = StepSite() if whole else SegmentSite(self.head, self.tail, self.depth)
        policy: Policy = Interval(self.interval) if by_interval else Threshold(self.threshold)
        cap = self.interval - 1 if by_interval else _THRESHOLD_CAP
        return Recipe(
            site=site,
            policy=policy,
            predictor=self._predictor,
            indicator=None if by_interval else TransformRate if whole else InputChange,
            first=self.first,
            last=self.last,
            cap=cap if self.max_skips is None else self.max_skips,
            exact=self.exact,
            per_row=self.per_row,
        )

    @property
    def _predictor(self) -> AnyPredictor:
        grouped = GROUPED.get(self.predictor)
        return over(PREDICTORS[self.predictor], self.axis) if grouped is None else grouped

    @property
    def exact(self) -> bool:
        """Whether these options never skip anything."""
        never = self.interval == 1 if self.policy == "interval" else self.threshold == 0
        return never or self.max_skips == 0
