"""Slopes of known power laws, and their intervals against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffeff.errors import ConfigError
from diffeff.eval.bench.slope import fit_slope, t_quantile


@pytest.mark.parametrize("power", [-1.0, 0.5, 1.0, 2.0])
def test_an_exact_power_law(power: float) -> None:
    x = [16, 64, 128, 300]
    found = fit_slope(x, [0.03 * value**power for value in x])
    assert found.value == pytest.approx(power)
    assert found.low == pytest.approx(power)
    assert found.high == pytest.approx(power)
    assert found.points == 4


@pytest.mark.parametrize("count", [3, 5, 20])
def test_interval_as_scipy_has_it(count: int) -> None:
    random = np.random.default_rng(count)
    x = np.sort(random.uniform(1, 100, count))
    y = x**1.3 * np.exp(random.normal(0, 0.1, count))
    fit = stats.linregress(np.log(x), np.log(y))
    reach = stats.t.ppf(0.975, count - 2) * fit.stderr
    found = fit_slope(x.tolist(), y.tolist())
    assert found.value == pytest.approx(fit.slope)
    assert (found.low, found.high) == pytest.approx((fit.slope - reach, fit.slope + reach), rel=1e-4)


def test_the_interval_covers_the_truth_in_95_of_100() -> None:
    random = np.random.default_rng(0)
    x = np.array([1.0, 2.0, 4.0, 8.0])
    hits = 0
    for _ in range(2000):
        found = fit_slope(x.tolist(), (x**1.5 * np.exp(random.normal(0, 0.2, 4))).tolist())
        hits += found.low <= 1.5 <= found.high
    assert 0.935 <= hits / 2000 <= 0.965


def test_t_quantiles() -> None:
    for freedom in range(1, 200):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-4)
    with pytest.raises(ConfigError, match="1 <= int"):
        t_quantile(0)


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        ([1, 2], [1, 2], "at least 3 points"),
        ([1, 2, 2], [1, 2, 2], "at least 3 points at different x, got 2"),
        ([1, 2, 3], [1, 2], "at least 3 points"),
        ([1, 2, 3], [1, 0, 2], "above 0"),
        ([1, 2, 3], [1, float("nan"), 2], "finite"),
        ([1, 2, float("inf")], [1, 2, 3], "finite"),
    ],
)
def test_what_has_no_slope_is_refused(x: list[float], y: list[float], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        fit_slope(x, y)
