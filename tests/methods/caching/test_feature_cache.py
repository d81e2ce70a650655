"""FeatureCache on real pipelines with random weights: exactness, counts, state, refusals."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from tiny import call_kwargs, make, run

from diffeff.errors import MethodInapplicable, PlanConflict
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.pipeline import DiffEffPipeline

# numpy 2 about diffusers' schedulers
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SITES = ["step", "segment"]
ALL = [
    "wan", "wan-2expert", "cogvideox", "ltx", "hunyuanvideo", "flux", "flux-cfg", "sd3", "pixart", "dit",
    "sd", "sd-controlnet", "sdxl", "animatediff", "svd",
]  # fmt: skip


def cached(family: str, **options: Any) -> DiffEffPipeline:
    return DiffEffPipeline(make(family), [FeatureCache(**options)])


def details(pipe: DiffEffPipeline) -> Any:
    assert pipe.report is not None
    return pipe.report.methods[0].details


@cache
def plain(family: str, steps: int) -> torch.Tensor:
    """The output without any plan."""
    return run(family, make(family), steps=steps)


@pytest.mark.parametrize("family", ALL)
def test_exact_settings_are_bit_identical(family: str) -> None:
    pipe = cached(family, site="step", interval=1)
    for config in (FeatureCache(site="segment", policy="threshold", threshold=0), FeatureCache(max_skips=0)):
        assert torch.equal(run(family, pipe, steps=3), plain(family, 3))
        assert pipe.report is not None
        assert not pipe.report.methods[0].engaged
        pipe.apply([config])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ALL)
def test_every_branch_computes_the_same_steps(family: str, site: str) -> None:
    pipe = cached(family, site=site, interval=2, first=2, last=1)
    found = run(family, pipe, steps=9)
    assert torch.isfinite(found).all()
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged
    for name, row in details(pipe).items():
        if name != "decided":
            computed = {v for branch, v in row["computed"].items() if branch != "both"}  # "both": rows not yet known
            assert len(computed) == 1
            assert row["skipped_steps"]
            assert row["bytes_held"]
    shares = pipe.report.steps if site == "step" else pipe.report.blocks
    assert 0.3 * shares["cond"].total < shares["cond"].computed < shares["cond"].total


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("predictor", ["hold", "linear"])
@pytest.mark.parametrize("family", ["wan", "flux", "sd-controlnet"])
def test_a_cached_run_stays_near_the_plain_one(family: str, predictor: str, site: str) -> None:
    """Many steps of a smooth model: a wrong branch, block or residual would show at once."""
    expected = plain(family, 14)
    found = run(family, cached(family, site=site, predictor=predictor, interval=2), steps=14)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_constant_model_is_predicted_exactly() -> None:
    pipe = make("wan")
    pipe.transformer.proj_out.weight.zero_()
    pipe.transformer.proj_out.bias.fill_(0.5)
    expected = run("wan", pipe, steps=8)
    found = run("wan", DiffEffPipeline(pipe, [FeatureCache(interval=3, predictor="hold", first=1)]), steps=8)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("site", SITES)
def test_schedulers_that_repeat_timesteps(scheduler: str, site: str) -> None:
    pipe = make("sd")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    wrapped = DiffEffPipeline(pipe, [FeatureCache(site=site, interval=2, first=2)])  # type: ignore[arg-type]
    assert torch.isfinite(run("sd", wrapped, steps=8)).all()
    row = details(wrapped)["unet"]
    assert row["computed"]["cond"] / row["total"]["cond"] == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("family", ["sd-img2img", "wan-v2v"])
def test_a_late_start_counts_from_there(family: str) -> None:
    pipe = cached(family, interval=2, first=2, last=1)
    run(family, pipe, steps=10)
    row = next(iter(details(pipe).values()))
    assert row["total"]["cond"] == 7
    assert row["skipped_steps"] == [5, 7]


def test_experts_have_their_own_history() -> None:
    pipe = cached("wan-2expert", interval=3, first=1, last=1, predictor="hold")
    run("wan-2expert", pipe, steps=12)
    rows = details(pipe)
    one, two = rows["transformer"], rows["transformer_2"]
    start = one["total"]["cond"]
    assert one["computed"]["cond"] >= 1
    assert start not in two["skipped_steps"]
    assert start + two["total"]["cond"] == 12


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["wan", "sd"])
def test_another_batch_and_an_interrupted_run_leave_nothing(family: str, site: str) -> None:
    def stop(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 4:
            raise InterruptedError
        return kwargs

    options = {"site": site, "policy": "threshold", "threshold": 5.0, "first": 1}
    fresh = run(family, cached(family, **options), seed=1)
    pipe = cached(family, **options)
    with pytest.raises(InterruptedError):
        pipe(**call_kwargs(family, pipe, batch=2), callback_on_step_end=stop)
    assert torch.equal(run(family, pipe, seed=1), fresh)


def single_rows(family: str, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arguments of a batch of two, and of its rows alone, with the same initial noise."""
    pipe = make(family)
    both = call_kwargs(family, pipe, batch=2, steps=steps)
    shape = run(family, pipe, steps=1).shape[1:]
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))
    noise[1] *= 0.2
    both["latents"] = noise
    return both, [{k: v[r : r + 1] if isinstance(v, torch.Tensor) else v for k, v in both.items()} for r in (0, 1)]


@pytest.mark.parametrize("family", ["wan", "sd"])
def test_rows_apart_decide_as_in_single_runs(family: str) -> None:
    """The decisions are the same ones; values differ by what matrix products of another batch size round otherwise,
    as they do without a plan. The scripted denoiser shows bitwise equality."""
    both, singles = single_rows(family, 10)
    options = {"policy": "threshold", "threshold": 0.15, "per_row": True, "first": 2, "predictor": "hold"}
    pipe = cached(family, **options)
    together = pipe(**both, return_dict=False)[0]
    plans = []
    for row, kwargs in enumerate(singles):
        alone = cached(family, **options)
        found = alone(**kwargs, return_dict=False)[0]
        torch.testing.assert_close(found, together[row : row + 1], atol=1e-4, rtol=1e-4)
        plans.append(next(iter(details(alone).values()))["computed"]["cond"])
    assert next(iter(details(pipe).values()))["computed"]["cond"] == sum(plans) / 2


@pytest.mark.parametrize("site", SITES)
def test_too_few_steps_is_refused(site: str) -> None:
    pipe = cached("wan", site=site)
    with pytest.raises(MethodInapplicable, match="too few for a cache"):
        run("wan", pipe, steps=4)
    run("wan", pipe, steps=8)


@pytest.mark.parametrize("site", SITES)
def test_nothing_skipped_names_the_changes(site: str) -> None:
    pipe = cached("sd", site=site, policy="threshold", threshold=1e-9)
    run("sd", pipe, steps=8)
    assert pipe.report is not None
    assert "below every observed change" in pipe.report.methods[0].reason
    chosen = details(pipe)["unet"]["change"]["median"]
    pipe.apply([FeatureCache(site=site, policy="threshold", threshold=1.01 * chosen)])  # type: ignore[arg-type]
    run("sd", pipe, steps=8)
    assert pipe.report.methods[0].engaged


@pytest.mark.parametrize(("family", "edges"), [("wan", {"head": 3, "tail": 1}), ("sd", {"depth": 4})])
def test_edges_that_leave_no_block_are_refused(family: str, edges: dict[str, int]) -> None:
    with pytest.raises(MethodInapplicable, match="no block of"):
        cached(family, site="segment", **edges)


@pytest.mark.parametrize(("family", "edges", "inner"), [("wan", {"head": 1, "tail": 1}, 2), ("sd", {"depth": 2}, 3)])
def test_edges_are_always_computed(family: str, edges: dict[str, int], inner: int) -> None:
    pipe = cached(family, site="segment", interval=2, first=2, last=1, **edges)
    run(family, pipe, steps=8)
    assert pipe.report is not None
    share = pipe.report.blocks["cond"]
    assert share.total - share.computed == 3 * inner


def test_two_caches_conflict() -> None:
    pipe = DiffEffPipeline(make("wan"))
    for pair in (("step", "step"), ("segment", "segment"), ("step", "segment")):
        with pytest.raises(PlanConflict):
            pipe.apply([FeatureCache(site=site) for site in pair])


def test_bfloat16_comes_back_as_bfloat16() -> None:
    for site in SITES:
        pipe = make("flux")
        pipe.transformer.to(torch.bfloat16)
        kwargs = call_kwargs("flux", pipe, steps=8)
        kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        wrapped = DiffEffPipeline(pipe, [FeatureCache(site=site)])  # type: ignore[arg-type]
        found = wrapped(**kwargs, return_dict=False)[0]
        assert found.dtype is torch.bfloat16
        assert torch.isfinite(found).all()
