"""The exponent of a power law: a straight line through logarithms, with the interval its points allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from diffeff.errors import ConfigError

__all__ = ["MIN_POINTS", "Slope", "fit_slope", "t_quantile"]

MIN_POINTS = 3
"""Two points have a slope but nothing that says how far to trust it."""


@dataclass(frozen=True)
class Slope:
    """`y` grows like `x ** value`; `low` to `high` is the 95 % interval. 1 is linear, 2 quadratic."""

    value: float
    low: float
    high: float
    points: int

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready, to four decimals."""
        return {name: round(number, 4) for name, number in vars(self).items()}


def fit_slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Least squares of log y on log x; interval by Student's t with n - 2 degrees of freedom.

    It speaks for the range that was measured: a fixed cost bends the curve at its lower end and lowers the slope.
    Raises ConfigError for fewer than 3 different x, for values that are not above zero, and for unequal lengths.
    """
    if len(x) != len(y) or len(set(x)) < MIN_POINTS:
        raise ConfigError(
            f"a slope needs at least {MIN_POINTS} points at different x, got {len(set(x))} (x: {len(x)}, y: {len(y)})"
        )
    if not all(0 < value < math.inf for value in (*x, *y)):
        raise ConfigError("a log-log slope needs finite values above 0")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = fmean(u), fmean(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    rest = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    freedom = len(u) - 2
    reach = t_quantile(freedom) * math.sqrt(rest / freedom / spread)
    return Slope(slope, slope - reach, slope + reach, len(u))


# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_NORMAL = 1.959964


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond 10 degrees of freedom by Cornish and Fisher's expansion (to 2e-4)."""
    if freedom < 1:
        raise ConfigError(f"degrees of freedom are {freedom}; allowed: 1 <= int")
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, n = _NORMAL, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
