"""The table of metrics: names, what they need, and how values become results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from diffeff.errors import ConfigError, UnknownName
from diffeff.eval.metrics.result import Interval, Result
from diffeff.eval.metrics.table import METRICS, resolve

SCALARS = ["psnr", "ssim", "mae", "latent_cosine", "latent_l2", "flicker", "warping_error", "motion"]
SETS = ["fid", "kid", "cmmd", "precision", "recall", "fvd"]
NAMES = [*SCALARS, *SETS, "clip", "clip_consistency", "lpips", "adherence"]


def test_every_name_is_there_once() -> None:
    assert list(METRICS) == NAMES
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_complete_and_consistent(name: str) -> None:
    metric = METRICS[name]
    assert metric.label
    assert metric.summary.endswith(".")
    assert metric.source
    assert ("reference" in metric.needs) == (metric.kind in {"paired", "set"})
    assert ("prompts" in metric.needs) == (metric.kind in {"aligned", "world"})
    assert metric.needs.isdisjoint({"text", "clips", "maps"}) or "features" in metric.needs


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        METRICS["psnr"] = METRICS["ssim"]  # type: ignore[index]


def test_names_resolve_in_their_order_each_once() -> None:
    assert [metric.name for metric in resolve(["ssim", "psnr", "ssim"])] == ["ssim", "psnr"]


def test_no_metric_and_unknown_metrics() -> None:
    with pytest.raises(ConfigError, match="no metric is asked for: name at least one of psnr, ssim"):
        resolve([])
    with pytest.raises(UnknownName, match=r"no metric 'pnsr'\. Did you mean 'psnr'"):
        resolve(["psnr", "pnsr"])


def test_a_result_names_its_features_and_survives_json() -> None:
    facts = {"label": "sprites", "sha256": "ab"}
    result = METRICS["fid"].result(1.5, 7, interval=Interval(1, 2, "x"), features=facts, notes=["few"])
    assert (result.label, result.better, result.n) == ("FID-sprites", "lower", 7)
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert METRICS["psnr"].result(30, 2).label == "PSNR"


def test_the_mean_over_items_has_a_bootstrap_interval() -> None:
    values = list(np.random.default_rng(0).normal(30, 2, 50))
    result = METRICS["psnr"].over_items(values)
    assert result.value == pytest.approx(np.mean(values))
    assert result.interval is not None
    assert result.interval.low < result.value < result.interval.high
    assert result.details["min"] == min(values)
    assert result.notes == ()


def test_identical_items_are_counted_not_averaged() -> None:
    result = METRICS["psnr"].over_items([30.0, math.inf, 34.0])
    assert (result.value, result.n, result.details["identical"]) == (32, 3, 1)
    assert result.notes == ("1 of 3 items are identical to their reference and left out of the mean",)
    every = METRICS["psnr"].over_items([math.inf, math.inf])
    assert math.isinf(every.value)
    assert every.interval is None
    assert every.details["identical"] == 2


def test_items_without_a_value_are_left_out_and_counted() -> None:
    result = METRICS["motion"].over_items([None, 2.0, 4.0])
    assert (result.value, result.n) == (3, 2)
    assert result.notes == ("1 of 3 items have no value and are left out",)
    with pytest.raises(ConfigError, match="motion: none of the 2 items has a value"):
        METRICS["motion"].over_items([None, None])


def test_one_item_has_no_interval_and_nan_is_not_hidden() -> None:
    assert METRICS["ssim"].over_items([0.5]).interval is None
    assert math.isnan(METRICS["ssim"].over_items([0.5, math.nan]).value)
