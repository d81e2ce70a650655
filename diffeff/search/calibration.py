"""Calibrated data of caches, each from one run of the model: polynomials, magnitudes, tables of steps.

`calibrate(pipe, job, TeaCache(threshold=0.1))` gives the same config with its calibrated options filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from diffeff.core.config import Config
from diffeff.core.run import Run
from diffeff.errors import MethodInapplicable, UnknownName, nearest
from diffeff.methods.caching.indicator import relative_change
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.published.magcache import MagCache
from diffeff.methods.caching.published.teacache import TeaCache
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite
from diffeff.search.trace import Job, attached

__all__ = ["CALIBRATIONS", "calibrate", "calibrate_magcache", "calibrate_teacache"]

ConfigT = TypeVar("ConfigT", bound=Config)

CALIBRATIONS: Mapping[str, str] = MappingProxyType(
    {
        "teacache": "diffeff.search.calibration:calibrate_teacache",
        "magcache": "diffeff.search.calibration:calibrate_magcache",
        "l2p": "diffeff.search.predictor_fit:calibrate_l2p",
        "meancache": "diffeff.search.mean_velocity:calibrate_meancache",
        "step_rehash": "diffeff.search.profiles:similarity_profile",
        "smoothcache": "diffeff.search.profiles:error_table",
        "profilingdit": "diffeff.search.profiles:block_drift",
    }
)
"""Where the calibration of each method lives: a function of (pipe, job, config) that gives the config filled in."""

_DEGREE = 4
_POINTS_PER_DEGREE = 4


def calibrate(pipe: Any, job: Job, config: ConfigT) -> ConfigT:
    """`config` with its calibrated options measured on one run of `job`.

    `pipe` is a DiffEffPipeline whose own plan is off; the job's steps should be about those of later runs, its prompts
    a few typical ones. Costs one plain run. Raises UnknownName for a method without calibrated options.
    """
    if config.name not in CALIBRATIONS:
        raise UnknownName(f"{config.name} has nothing to calibrate. {nearest(config.name, CALIBRATIONS)}")
    module, name = CALIBRATIONS[config.name].split(":")
    found: ConfigT = getattr(import_module(module), name)(pipe, job, config)
    return found


def calibrate_teacache(pipe: Any, job: Job, config: TeaCache) -> TeaCache:
    """Fits the change of the block stack's residual, which a skipped step holds, to that of its modulated input.

    Of degree 4, or less where the run has fewer than 4 steps per degree.
    """
    seen = _measure(pipe, job, StackSite(head=0, look="modulated"))
    moved, turned = np.array(seen.moved[1:]), np.array(seen.turned[1:])
    degree = max(1, min(_DEGREE, len(moved) // _POINTS_PER_DEGREE))
    fit = np.polyfit(moved, turned, degree)
    low, high = float(moved.min()), float(moved.max())
    return replace(config, coefficients=tuple(fit.tolist()), range_low=low, range_high=high)


def calibrate_magcache(pipe: Any, job: Job, config: MagCache) -> MagCache:
    """Measures the size of the block stack's residual by noise level, 1 at the first step: the product of the mean
    ratios of token norms from step to step, as published."""
    seen = _measure(pipe, job, StackSite(head=0, look="state"))
    if any(s != s for s in seen.sigmas):
        raise MethodInapplicable("magcache: the scheduler tells no noise levels, which the table is kept by")
    sizes = dict(zip(seen.sigmas, np.cumprod(seen.ratios).tolist(), strict=True))
    return replace(config, sigmas=tuple(sizes), magnitudes=tuple(sizes.values()))


# --- one instrumented run -----------------------------------------------------------------------------------------
@dataclass
class _Meter:
    """An indicator that decides nothing and writes down what it sees: changes from step to step."""

    sigmas: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    """Relative change of what the site shows."""
    turned: list[float] = field(default_factory=list)
    """Relative change of what the site puts out."""
    ratios: list[float] = field(default_factory=list)
    """Mean ratio of the norms of the output's tokens."""
    shown: Tensor | None = None
    output: Tensor | None = None

    def view(self, run: Run, x: Tensor) -> Tensor:
        """Passes `x` on and notes the noise level."""
        self.sigmas.append(run.clock.sigma)
        return x

    def change(self, x: Tensor) -> float | None:
        self.moved.append(0.0 if self.shown is None else relative_change(x, self.shown))
        self.shown = x.detach().clone()
        return None

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        if output is None:
            return
        old, self.output = self.output, output.detach().clone()
        self.turned.append(0.0 if old is None else relative_change(output, old))
        self.ratios.append(1.0 if old is None else _ratio(output, old))


def _ratio(new: Tensor, old: Tensor) -> float:
    return float((new.float().norm(dim=-1) / (old.float().norm(dim=-1) + 1e-8)).mean())


@dataclass(frozen=True, kw_only=True)
class _Measuring(CacheConfig):
    name: ClassVar[str] = "calibration"
    summary: ClassVar[str] = "Computes everything and measures the block stack."


def _measure(pipe: Any, job: Job, site: StackSite) -> _Meter:
    """What the stack does in a run of `job`, of its first denoiser's conditional branch."""
    meters: list[_Meter] = []
    latest: Callable[[Run, Tensor], Tensor] = lambda run, x: meters[-1].view(run, x)  # noqa: E731

    def make() -> _Meter:
        meters.append(_Meter())
        return meters[-1]

    recipe = Recipe(site, Interval(1), indicator=make, view=latest)
    with attached(pipe, site.build(_Measuring(), recipe)) as run:
        run(job)
    if len(meters) > 1:
        raise MethodInapplicable(
            "calibration needs a pipeline with one denoiser: the experts of this one would need a table each"
        )
    return meters[0]
