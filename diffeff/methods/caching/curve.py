"""Calibrated functions of the noise level: what a table of numbers means at another number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffeff.errors import ConfigError

__all__ = ["Curve", "nearest_entries"]


@dataclass(frozen=True)
class Curve:
    """A function of sigma through calibrated points: straight between them, constant beyond them."""

    sigmas: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.values):
            raise ConfigError(
                f"a calibrated table has {len(self.sigmas)} noise levels and {len(self.values)} values; it needs one "
                "value for each. Make it anew with diffeff.search.calibration.calibrate."
            )

    def __call__(self, sigma: float) -> float:
        """Its value at one noise level."""
        points = sorted(zip(self.sigmas, self.values, strict=True))
        return float(np.interp(sigma, [s for s, _ in points], [v for _, v in points]))


def nearest_entries(wanted: Sequence[float], sigmas: Sequence[float]) -> tuple[int, ...]:
    """For every wanted noise level the entry of `sigmas` (falling) next to it; where two fall on one entry, the later
    takes the next free one. So a table keeps its number of steps wherever the run has as many."""
    taken: list[int] = []
    for level in sorted(wanted, reverse=True):
        entry = int(np.argmin(np.abs(np.asarray(sigmas) - level)))
        entry = max(entry, taken[-1] + 1) if taken else entry
        if entry < len(sigmas):
            taken.append(entry)
    return tuple(taken)
