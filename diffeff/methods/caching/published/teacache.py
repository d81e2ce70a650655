"""TeaCache: the modulated input of the first block tells how far the output has moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.errors import ConfigError
from diffeff.methods.caching.indicator import Accumulated, Link
from diffeff.methods.caching.policy import Threshold
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.stack_cache import StackSite

__all__ = ["TeaCache"]

_MISSING = (
    "it has no polynomial for this model. Make one: diffeff.search.calibration.calibrate(pipe, job, TeaCache()), or "
    "give coefficients=TeaCache.PUBLISHED[family] for a published model at its own resolution."
)
_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_HUNYUAN = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
_LTX = (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)
_MOCHI = (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719)
_COSMOS = (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633)
_LUMINA = (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)
_HIDREAM = (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901)
_WAN_1 = (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774)
_WAN_14 = (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404)


@dataclass(frozen=True, kw_only=True)
class TeaCache(CacheConfig):
    """Skips the block stack while its first modulated input says that the output has hardly moved.

    Rule: the relative L1 change, from each step to the next, of what enters the first attention (normalised and
    modulated by the timestep) goes through a polynomial fitted to the change of the output; the values are summed since
    the last computed step, and the stack is computed when the sum reaches `threshold`. A skipped step costs the
    embeddings and one normalisation: the decision falls inside the first block, before its attention.

    Differs: the published polynomials of degree 4 are used wherever they lead: those of Wan are negative for small
    changes, so that a quiet stretch pays back what was summed and the cache never computes again. Here values are
    clamped to 0 and above, and changes to the range the fit saw (`range_low`, `range_high`).

    Defaults: thresholds of a calibration of ours are estimated relative changes of the stack's residual; published
    thresholds belong to published coefficients, for one resolution and scheduler. PUBLISHED has both by family.

    Memory: one residual per stream and branch, and one modulated input. Reads one pair of numbers back per step.

    Source: TeaCache (arXiv 2411.19108).
    """

    name: ClassVar[str] = "teacache"
    summary: ClassVar[str] = "Skips the block stack while its modulated input says the output hardly moves."
    PUBLISHED: ClassVar[Mapping[str, tuple[float, ...]]] = MappingProxyType(
        {
            "flux": _FLUX,
            "hunyuanvideo": _HUNYUAN,
            "ltx": _LTX,
            "mochi": _MOCHI,
            "cosmos": _COSMOS,
            "lumina2": _LUMINA,
            "hidream": _HIDREAM,
            "wan-1.3b": _WAN_1,
            "wan-14b": _WAN_14,
        }
    )
    """Coefficients of the authors' fits."""
    THRESHOLDS: ClassVar[Mapping[str, tuple[float, ...]]] = MappingProxyType(
        {
            "flux": (0.25, 0.4, 0.6, 0.8),
            "hunyuanvideo": (0.1, 0.15),
            "wan-1.3b": (0.05, 0.07, 0.08),
            "wan-14b": (0.14, 0.15, 0.2),
        }
    )
    """Thresholds that go with them, slow to fast."""

    threshold: float = knob(0.1, "compute when the summed, rescaled change reaches this", low=0, high=100)
    coefficients: tuple[float, ...] = knob((), "of the fitted polynomial, highest power first (calibrated)")
    range_low: float = knob(0.0, "smallest change that the fit saw", low=0)
    range_high: float = knob(1e9, "largest change that the fit saw", low=0)
    first: int = knob(1, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(None, "most steps predicted in a row; none: no limit", low=0, step=1)

    def check(self) -> None:
        if self.range_high < self.range_low:
            raise ConfigError(f"teacache.range_high is {self.range_high}; allowed: range_low ({self.range_low}) and up")

    def recipe(self) -> Recipe:
        return Recipe(
            site=StackSite(head=0, look="modulated"),
            policy=Threshold(self.threshold),
            indicator=partial(Accumulated, Link(self.coefficients, self.range_low, self.range_high)),
            first=self.first,
            last=self.last,
            cap=self.max_skips,
            exact=self.threshold == 0 or self.max_skips == 0,
            missing="" if self.coefficients else _MISSING,
        )
