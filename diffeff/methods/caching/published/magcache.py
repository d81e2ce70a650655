"""MagCache: the size of the stack's residual by noise level says beforehand which steps can be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.errors import ConfigError
from diffeff.methods.caching.curve import Curve
from diffeff.methods.caching.policy import MagnitudeBudget
from diffeff.methods.caching.predictor import Polynomial, Scaled
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite

__all__ = ["MagCache"]

_MISSING = (
    "it has no magnitudes for this model. Make them with one run: "
    "diffeff.search.calibration.calibrate(pipe, job, MagCache())."
)


@dataclass(frozen=True, kw_only=True)
class MagCache(CacheConfig):
    """Skips the block stack where its residual is known to keep its size; the same steps for every prompt.

    Rule: with the residual's size known by noise level (one calibration run), every step since the last computed one
    adds how far the size has moved, |1 - size now / size then|; the stack is computed when the sum reaches `threshold`
    or `max_skips` were skipped. Nothing is read back from the device.

    Differs: the published form knows the size and yet adds the old residual unscaled; here it is scaled (`scale=False`
    holds). It stores ratios of consecutive steps, which mean something else at another number of steps, and diffusers
    counts steps up to a number given beforehand (28) and begins again there; here sizes belong to noise levels and the
    clock is the scheduler's. On the calibrated schedule the decisions are the published ones (tested against
    diffusers).

    Defaults: diffusers'; the authors use 0.12 with 4 skips (0.24 with 6: fast) on Wan.

    Memory: one residual per stream and branch.

    Source: MagCache (arXiv 2506.09045).
    """

    name: ClassVar[str] = "magcache"
    summary: ClassVar[str] = "Skips the block stack where a calibrated table says that its residual keeps its size."
    PUBLISHED: ClassVar[Mapping[str, tuple[float, int]]] = MappingProxyType(
        {"flux": (0.06, 3), "wan": (0.12, 4), "wan-fast": (0.24, 6)}
    )
    """threshold and max_skips"""

    threshold: float = knob(0.06, "compute when the summed change of size reaches this", low=0, high=100)
    max_skips: int = knob(3, "most steps predicted in a row", low=0, step=1)
    warmup: float = knob(0.2, "share of the run, at its start, that is always computed", low=0, high=1, step=0.05)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    scale: bool = knob(True, "scale the held residual by the known change of its size")
    sigmas: tuple[float, ...] = knob((), "noise levels of the calibration run")
    magnitudes: tuple[float, ...] = knob((), "size of the residual at each of them (calibrated)")

    def check(self) -> None:
        if len(self.sigmas) != len(self.magnitudes) or any(not m > 0 for m in self.magnitudes):
            raise ConfigError(
                f"magcache.magnitudes has {len(self.magnitudes)} values for {len(self.sigmas)} sigmas; allowed: one "
                "above 0 for each"
            )

    def recipe(self) -> Recipe:
        curve = Curve(self.sigmas, self.magnitudes)
        return Recipe(
            site=StackSite(head=0, look="state"),
            policy=MagnitudeBudget(curve, self.threshold),
            predictor=Scaled(curve) if self.scale else Polynomial(0),
            first=1,
            last=self.last,
            cap=self.max_skips,
            warmup=self.warmup,
            exact=self.threshold == 0 or self.max_skips == 0,
            missing="" if self.sigmas else _MISSING,
        )
