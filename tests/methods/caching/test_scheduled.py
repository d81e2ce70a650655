"""ScheduledCache: exactness, counts, transfer to other step counts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make, run

from diffeff.errors import ConfigError, MethodInapplicable, PlanConflict
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.caching.scheduled import ScheduledCache, entries_of
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.search.schedule import Schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
FAMILIES = ["wan", "wan-2expert", "cogvideox", "flux", "flux-cfg", "sd3", "dit", "sd", "sdxl", "animatediff", "svd"]
ACTIONS = ("both", "both", "cond", "none", "none", "both", "none", "cond")


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_everything_is_bit_identical(family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=5)
    pipe.apply(ScheduledCache(actions=("both",) * 5))
    assert torch.equal(run(family, pipe, steps=5), plain)
    assert pipe.report is not None
    assert not pipe.report.methods[0].engaged
    assert "computes all" in pipe.report.methods[0].reason


@pytest.mark.parametrize("family", FAMILIES)
def test_it_skips_what_it_says_and_comes_off(family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=8)
    pipe.apply(ScheduledCache(actions=ACTIONS))
    first = run(family, pipe, steps=8)
    report = pipe.report
    assert report is not None
    assert report.methods[0].engaged
    assert report.methods[0].details["predicted_steps"] == [3, 4, 6]
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain)
    assert torch.equal(run(family, pipe, steps=8), first)
    if "uncond" in report.steps:
        assert report.methods[0].details["halved_steps"] == [2, 7]
        uncond, both = (report.steps[b].computed if b in report.steps else 0 for b in ("uncond", "both"))
        assert uncond + both == pytest.approx(3)
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=8), plain)


def test_an_interrupted_run_leaves_nothing() -> None:
    pipe = DiffEffPipeline(make("wan"), ScheduledCache(actions=ACTIONS))
    expected = run("wan", pipe, steps=8)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("wan", pipe, steps=8, callback_on_step_end=stop)
    assert torch.equal(run("wan", pipe, steps=8), expected)
    assert torch.isfinite(run("wan", pipe, steps=8, size=(2, 8, 8))).all()


def test_weights_do_what_they_say() -> None:
    """A fitted sum that repeats the last prediction is the predictor hold."""
    pipe = DiffEffPipeline(make("wan"))
    actions = ("both", "both", "none", "none", "both")
    held = ScheduledCache(actions=actions, predictors=("hold", "hold"))
    pipe.apply(held)
    expected = run("wan", pipe, steps=5)
    fitted = ScheduledCache(actions=actions, predictors=("fitted",) * 2, weights=(0.0, 0.0, 1.0) * 2)
    assert torch.equal(run("wan", pipe.apply(fitted), steps=5), expected)
    moved = ScheduledCache(actions=actions, predictors=("fitted",) * 2, weights=(0.1, 0.0, 1.0) * 2)
    assert not torch.equal(run("wan", pipe.apply(moved), steps=5), expected)


def test_other_step_counts_compute_the_nearest_noise_levels() -> None:
    tuned = [1 - k / 10 for k in range(10)]
    config = ScheduledCache(
        actions=("both", "both", "none", "none", "both", "none", "none", "none", "both", "none"),
        sigmas=tuple(tuned),
        predictors=("fitted",) * 6,
        weights=tuple(0.1 * k for k in range(1, 19)),
    )
    same = entries_of(config, tuned)
    assert [e.action for e in same] == list(config.actions)
    assert same[2].weights == pytest.approx((0.1, 0.2, 0.3))
    finer = entries_of(config, [1 - k / 20 for k in range(20)])
    assert [k for k, e in enumerate(finer) if e.action == "both"] == [0, 2, 8, 16]
    assert finer[4].weights == pytest.approx((0.1, 0.2, 0.3))
    assert finer[3].weights == pytest.approx((0.05, 0.1, 0.65))  # halfway from holding the last one
    assert finer[1].predictor == "linear"
    coarser = entries_of(config, [1 - k / 5 for k in range(5)])
    assert sum(e.action == "both" for e in coarser) == 4
    assert [e.action for e in entries_of(config, [1.0, 0.5, 0.25])] == ["both"] * 3


def test_a_schedule_is_kept_as_json(tmp_path: Path) -> None:
    schedule = Schedule(
        actions=("both", "cond", "none"), sigmas=(0.9, 0.5, 0.2), predictors=("fitted",), weights=((0.1, 0.2, 0.3),),
        deltas=((0.9, 0.1),), expected=0.02, curve=(0.02,), provenance={"model": {"family": "wan"}, "seeds": [0, 1]},
    )  # fmt: skip
    assert Schedule.load(schedule.save(tmp_path / "s.json")) == schedule
    assert schedule.rows == 3
    assert schedule.computed == (0, 1)
    config = schedule.config()
    assert Plan.from_dict(Plan([config]).to_dict()).methods == (config,)
    (tmp_path / "bad.json").write_text('{"diffeff_schedule": 1, "action": []}')
    with pytest.raises(ConfigError, match="actions"):
        Schedule.load(tmp_path / "bad.json")


def test_refusals() -> None:
    with pytest.raises(MethodInapplicable, match="diffeff tune"):
        DiffEffPipeline(make("wan"), ScheduledCache())
    with pytest.raises(ConfigError, match="first step"):
        ScheduledCache(actions=("none", "both"))
    with pytest.raises(ConfigError, match="allowed: both, cond, none"):
        ScheduledCache(actions=("both", "skip"))
    with pytest.raises(ConfigError, match=r"weights has 1 values; these actions need 2"):
        ScheduledCache(actions=("both", "none"), predictors=("fitted",), weights=(1.0,))
    with pytest.raises(ConfigError, match="sigmas must fall"):
        ScheduledCache(actions=("both", "none"), sigmas=(0.1, 0.2))
    with pytest.raises(PlanConflict, match="scheduled_cache"):
        DiffEffPipeline(make("wan"), [ScheduledCache(actions=ACTIONS), FeatureCache(site="step")])
