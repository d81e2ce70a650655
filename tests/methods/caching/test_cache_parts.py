"""The pure parts of caches: rules, predictors, indicators, tracks, against a scripted denoiser."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scripted import drive
from torch import Tensor

from diffeff.anatomy.types import CFG
from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.caching.indicator import InputChange, TransformRate, relative_change
from diffeff.methods.caching.policy import Action, Cap, FirstOf, Interval, Situation, Threshold, Window
from diffeff.methods.caching.predictor import combine, time_axis

ALL_CFG = [CFG.SEPARATE, CFG.BATCHED_UNCOND_FIRST, CFG.BATCHED_COND_FIRST]


def computes(rule: Any, done: int = 5, left: int = 5, since: int = 1, change: float | None = None) -> bool:
    return rule.decide(Situation(done, left, since, change)) is Action.COMPUTE


def test_rules() -> None:
    assert computes(Interval(1))
    assert not computes(Interval(2))
    assert computes(Interval(2), since=2)
    assert computes(Threshold(0.0), change=0.0)
    assert computes(Threshold(0.1), change=None)
    assert computes(Threshold(0.1), change=float("nan"))
    assert computes(Threshold(0.1), change=0.1)
    assert not computes(Threshold(0.1), change=0.09)
    assert computes(Window(3, 0), done=2)
    assert not computes(Window(3, 0), done=3)
    assert computes(Window(0, 2), left=1)
    assert not computes(Window(0, 2), left=2)
    assert computes(Cap(0))
    assert not computes(Cap(1))
    assert computes(Cap(1), since=2)
    assert computes(FirstOf((Cap(9), Interval(1))))
    assert not computes(FirstOf((Cap(9), Interval(2))))


def test_sums_are_taken_in_float32() -> None:
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    found = combine([x, x * 1.0078125], (-3.0, 4.0))
    assert found.item() == pytest.approx(1.03125)  # bfloat16 steps would lose the difference


def test_time_axis_is_strictly_monotone_or_falls_back() -> None:
    steps = torch.tensor([900.0, 600.0, 600.0, 300.0])
    fine = torch.tensor([9.0, 6.0, 5.0, 3.0, 0.0])
    assert time_axis(Clock(total=4, timesteps=steps, sigmas=fine)) == (9.0, 6.0, 5.0, 3.0)
    heun = torch.tensor([9.0, 6.0, 6.0, 3.0, 0.0])
    assert time_axis(Clock(total=4, timesteps=steps, sigmas=heun)) == (0.0, 1.0, 2.0, 3.0)
    assert time_axis(Clock(total=4, timesteps=fine[:4], sigmas=heun)) == (9.0, 6.0, 5.0, 3.0)
    assert time_axis(Clock(total=2, timesteps=fine[:2], sigmas=torch.tensor([float("inf"), 1.0]))) == (9.0, 6.0)


def test_indicators() -> None:
    assert relative_change(torch.full((2,), 1.5), torch.ones(2)) == 0.5
    assert relative_change(torch.ones(2), torch.zeros(2)) == float("inf")
    probe = InputChange()
    assert probe.change(torch.ones(2)) is None
    probe.computed(torch.ones(2), None)
    assert probe.change(torch.full((2,), 0.75)) == 0.25


def test_transform_rate_is_the_relative_change_of_a_linear_model() -> None:
    """v = 3x: the rate is 3 / |v| per unit of x, so the sum is the true relative change of v on a straight path."""
    rate = TransformRate()
    for x in (1.0, 2.0):
        assert rate.change(torch.full((4,), x)) is None
        rate.computed(torch.full((4,), x), torch.full((4,), 3 * x))
    assert rate.change(torch.full((4,), 2.5)) == pytest.approx(0.25)
    assert rate.change(torch.full((4,), 3.0)) == pytest.approx(0.5)


def along_time(x: Tensor, branch: str, index: int) -> Tensor:
    """Linear in sigma, another line for each branch."""
    t = 1 - index / 8
    return torch.full_like(x, (2.0 if branch == "cond" else -3.0) * t + 0.5)


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_linear_is_exact_on_what_is_linear_in_time(cfg: CFG) -> None:
    seen = drive([FeatureCache(interval=3, first=2, last=1)], along_time, cfg=cfg, batch=2)
    for branch in ("cond", "uncond"):
        assert seen.computed[branch] == [0, 1, 4, 7]
        for index, found in seen.outputs[branch].items():
            torch.testing.assert_close(found, along_time(found, branch, index), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_hold_repeats_each_branch_its_own(cfg: CFG) -> None:
    """Pyramid attention broadcast mixes the branches: computed pattern 1, 0, 1, 0 over cond, uncond."""
    seen = drive([FeatureCache(interval=2, predictor="hold", first=1, last=0)], along_time, cfg=cfg)
    for branch, outputs in seen.outputs.items():
        assert seen.computed[branch] == [0, 2, 4, 6]
        for index in (1, 3, 5, 7):
            assert torch.equal(outputs[index], outputs[index - 1])
            assert not torch.equal(outputs[index], seen.outputs["uncond" if branch == "cond" else "cond"][index])


@pytest.mark.parametrize("config", [FeatureCache(interval=1), FeatureCache(policy="threshold", threshold=0)])
@pytest.mark.parametrize("steps", [2, 8])
def test_exact_settings_compute_everything_and_say_so(config: FeatureCache, steps: int) -> None:
    seen = drive([config], along_time, steps=steps)
    assert seen.computed["cond"] == seen.computed["uncond"] == list(range(steps))
    engaged, reason = seen.engaged()
    assert not engaged
    assert "as asked" in reason


@pytest.mark.parametrize(("most", "expected"), [(0, 8), (1, 5), (2, 4), (None, 3)])
def test_cap_on_steps_skipped_in_a_row(most: int | None, expected: int) -> None:
    config = FeatureCache(policy="threshold", threshold=10, first=2, last=0, max_skips=most, predictor="hold")
    seen = drive([config], along_time, latents=lambda i: torch.full((1, 4), 1 + 0.01 * i))
    assert len(seen.computed["cond"]) == expected


def test_interval_longer_than_the_protected_middle_still_obeys_the_window() -> None:
    seen = drive([FeatureCache(interval=16, first=3, last=2)], along_time)
    assert seen.computed["cond"] == [0, 1, 2, 6, 7]


def test_too_few_steps_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(MethodInapplicable, match=r"4 steps are too few for a cache.*Run at least 6 steps"):
        drive([FeatureCache()], along_time, steps=4)
    with pytest.raises(MethodInapplicable, match="too few"):  # image to image starts late
        drive([FeatureCache()], along_time, steps=8, first=5)


def test_late_start_counts_protected_steps_from_there() -> None:
    seen = drive([FeatureCache(interval=2, first=2, last=1)], along_time, first=2)
    assert seen.computed["cond"] == [2, 3, 5, 7]


def test_heun_extrapolates_over_distinct_times() -> None:
    times = torch.tensor([1000.0, 800, 800, 600, 600, 400, 400, 200, 200])
    seen = drive([FeatureCache(interval=2, first=2, last=1)], along_time, timesteps=times)
    assert seen.computed["cond"] == [0, 1, 3, 5, 7, 8]
    assert all(torch.isfinite(x).all() for x in seen.outputs["cond"].values())


def test_experts_share_the_clock_and_nothing_else() -> None:
    def model(x: Tensor, branch: str, index: int) -> Tensor:
        return torch.full_like(x, 0.0 if index < 4 else 100.0)

    config = FeatureCache(interval=3, first=2, last=1, predictor="linear")
    seen = drive([config], model, steps=10, expert=lambda i: "transformer" if i < 4 else "transformer_2")
    assert 4 in seen.computed["cond"]
    assert [float(seen.outputs["cond"][i].max()) for i in range(10)] == [0.0] * 4 + [100.0] * 6
    assert set(seen.details()) == {"transformer", "transformer_2", "decided"}


def test_nothing_skipped_names_the_changes_seen() -> None:
    config = FeatureCache(policy="threshold", threshold=1e-9, first=2, last=1)
    seen = drive([config], lambda x, branch, i: x * (1 + i))
    engaged, reason = seen.engaged()
    assert not engaged
    assert "threshold 1e-09 is below every observed change (min" in reason
    spread = seen.details()["transformer"]["change"]
    assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    chosen = FeatureCache(policy="threshold", threshold=spread["median"], first=2, last=1)
    assert drive([chosen], lambda x, branch, i: x * (1 + i)).engaged()[0]


def test_report_counts() -> None:
    seen = drive([FeatureCache(interval=2, first=2, last=1)], along_time)
    found = seen.details()["transformer"]
    assert found["computed"] == {"cond": 5, "uncond": 5}
    assert found["total"] == {"cond": 8, "uncond": 8}
    assert found["skipped_steps"] == [2, 4, 6]
    assert found["bytes_held"] == 2 * 2 * 6 * 4  # two branches, two snapshots of six float32
    assert seen.engaged() == (True, "3 of 8 steps predicted")


def moving_rows(index: int) -> Tensor:
    """Row 0 moves steadily, row 1 hardly."""
    slow = torch.full((1, 5), 1 + 0.001 * index)
    return torch.cat([torch.full((1, 5), 1.0 + 0.5 * index), slow])


def square(x: Tensor, branch: str, index: int) -> Tensor:
    return x.square() + (1 if branch == "cond" else 2)


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_rows_that_decide_apart_equal_single_runs(cfg: CFG) -> None:
    config = FeatureCache(policy="threshold", threshold=0.3, per_row=True, first=2, last=1)
    both = drive([config], square, batch=2, cfg=cfg, latents=moving_rows)
    alone = (lambda i: moving_rows(i)[:1], lambda i: moving_rows(i)[1:])
    singles = [drive([config], square, cfg=cfg, latents=row) for row in alone]
    assert singles[0].computed != singles[1].computed
    for branch, index in itertools.product(("cond", "uncond"), range(8)):
        expected = torch.cat([single.outputs[branch][index] for single in singles])
        assert torch.equal(both.outputs[branch][index], expected)
    assert sum(both.rows["cond"]) == sum(len(single.computed["cond"]) for single in singles)
    assert both.details()["decided"] == "rows apart"


def test_pooled_rows_decide_together() -> None:
    config = FeatureCache(policy="threshold", threshold=0.3, first=2, last=1)
    seen = drive([config], square, batch=2, latents=moving_rows)
    assert set(seen.rows["cond"]) == {2}


def test_rows_cannot_decide_apart_inside_the_denoiser() -> None:
    with pytest.raises(ConfigError, match="site='step'"):
        FeatureCache(site="segment", per_row=True)


def test_what_a_pipeline_does_to_a_prediction_stays_outside() -> None:
    """Predictions that the caller overwrites must not reach the cache."""
    written: list[Tensor] = []

    def model(x: Tensor, branch: str, index: int) -> Tensor:
        for old in written:
            old.zero_()
        written.append(torch.full_like(x, 1.0 + index))
        return written[-1]

    seen = drive([FeatureCache(interval=2, first=1, last=0, predictor="hold")], model, branches=("cond",))
    assert [float(seen.outputs["cond"][i].max()) for i in range(4)] == [1.0, 1.0, 3.0, 3.0]
