"""Results survive JSON, and the bootstrap is the textbook's, in bounded memory."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest

from diffeff.eval.metrics.result import Interval, Result, bootstrap_mean


def test_an_infinite_value_survives_json() -> None:
    result = Result("psnr", "PSNR", math.inf, "dB", "higher", 3, None, None, {"identical": 3}, ("a note",))
    data = json.loads(json.dumps(result.to_dict()))
    assert (data["value"], data["infinite"]) == (None, True)
    assert Result.from_dict(data) == result


def test_not_a_number_survives_json() -> None:
    data = json.loads(json.dumps(Result("ssim", "SSIM", math.nan, "", "higher", 1, Interval(0, 1, "x")).to_dict()))
    back = Result.from_dict(data)
    assert math.isnan(back.value)
    assert back.interval == Interval(0, 1, "x")


def test_the_bootstrap_is_the_textbooks() -> None:
    values = np.random.default_rng(1).normal(10, 3, 400)
    draw = np.random.default_rng(7).integers(0, 400, (1000, 400))
    low, high = np.quantile(values[draw].mean(axis=1), (0.025, 0.975))
    interval = bootstrap_mean(values, seed=7)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)
    assert high - low == pytest.approx(2 * 1.96 * 3 / 20, rel=0.15)


def test_another_statistic() -> None:
    interval = bootstrap_mean(np.arange(101.0), statistic=lambda rows: np.median(rows, axis=1))
    assert interval.low < 50 < interval.high


def test_memory_does_not_grow_with_the_items() -> None:
    values = np.random.default_rng(0).random(20_000)
    tracemalloc.start()
    try:
        bootstrap_mean(values, resamples=200)  # 32 MB of draws at once otherwise
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6


def test_one_value_has_no_spread() -> None:
    with pytest.raises(ValueError, match="at least 2 items, got 1"):
        bootstrap_mean(np.ones(1))
