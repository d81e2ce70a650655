"""FeatureCache on real pipelines with random weights: exactness, counts, state, refusals."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from tiny import call_kwargs, make, run

from diffeff.errors import ConfigError, MethodInapplicable, PlanConflict
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.pipeline import DiffEffPipeline

# numpy 2 about diffusers' schedulers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SITES = ["step", "segment"]
ALL = [
    "wan", "wan-2expert", "cogvideox", "ltx", "hunyuanvideo", "flux", "flux-cfg", "sd3", "pixart", "dit",
    "sd", "sd-img2img", "sd-controlnet", "sdxl", "animatediff", "svd",
]  # fmt: skip


def cached(family: str, **options: Any) -> DiffEffPipeline:
    return DiffEffPipeline(make(family), [FeatureCache(**options)])


def details(pipe: DiffEffPipeline) -> Any:
    assert pipe.report is not None
    return pipe.report.methods[0].details


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ALL)
def test_exact_settings_are_bit_identical(family: str, site: str) -> None:
    plain = run(family, make(family), steps=3)
    pipe = cached(family, site=site, interval=1)
    assert torch.equal(run(family, pipe, steps=3), plain)
    pipe.apply([FeatureCache(site=site, policy="threshold", threshold=0)])  # type: ignore[arg-type]
    assert torch.equal(run(family, pipe, steps=3), plain)
    assert pipe.report is not None and not pipe.report.methods[0].engaged


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ALL)
def test_every_branch_computes_the_same_steps(family: str, site: str) -> None:
    pipe = cached(family, site=site, interval=2, first=2, last=1)
    found = run(family, pipe, steps=9)
    assert torch.isfinite(found).all()
    assert pipe.report is not None and pipe.report.methods[0].engaged
    for name, row in details(pipe).items():
        if name != "decided":
            assert len(set(row["computed"].values())) == len(set(row["total"].values())) == 1
            assert row["skipped_steps"] and row["bytes_held"]
    shares = pipe.report.steps if site == "step" else pipe.report.blocks
    assert all(0.3 * s.total < s.computed < s.total for s in shares.values())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("predictor", ["hold", "linear"])
@pytest.mark.parametrize("family", ["wan", "flux", "sd", "sd-controlnet"])
def test_a_cached_run_stays_near_the_plain_one(family: str, predictor: str, site: str) -> None:
    """Many steps of a smooth model: a wrong branch, block or residual would show at once."""
    plain = run(family, make(family), steps=20)
    found = run(family, cached(family, site=site, predictor=predictor, interval=2), steps=20)
    assert not torch.equal(found, plain)
    assert float((found - plain).norm() / plain.norm()) < 0.1


def test_a_constant_model_is_predicted_exactly() -> None:
    pipe = make("wan")
    pipe.transformer.proj_out.weight.zero_()
    pipe.transformer.proj_out.bias.fill_(0.5)
    plain = run("wan", pipe, steps=8)
    found = run("wan", DiffEffPipeline(pipe, [FeatureCache(interval=3, predictor="hold", first=1)]), steps=8)
    assert torch.equal(found, plain)


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
    assert one["computed"]["cond"] >= 1 and start not in two["skipped_steps"]
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
    split = lambda v, r: v[r : r + 1] if isinstance(v, torch.Tensor) else v  # noqa: E731
    return both, [{k: split(v, r) for k, v in both.items()} for r in (0, 1)]


@pytest.mark.parametrize("family", ["wan", "sd"])
def test_rows_apart_equal_single_runs(family: str) -> None:
    both, singles = single_rows(family, 10)
    options = {"policy": "threshold", "threshold": 0.15, "per_row": True, "first": 2, "predictor": "hold"}
    pipe = cached(family, **options)
    together = pipe(**both, return_dict=False)[0]
    plans = []
    for row, kwargs in enumerate(singles):
        alone = cached(family, **options)
        assert torch.equal(alone(**kwargs, return_dict=False)[0], together[row : row + 1])
        plans.append(next(iter(details(alone).values()))["computed"]["cond"])
    assert next(iter(details(pipe).values()))["computed"]["cond"] == sum(plans) / 2


@pytest.mark.parametrize("site", SITES)
def test_too_few_steps_is_refused(site: str) -> None:
    pipe = cached("wan", site=site)
    with pytest.raises(ConfigError, match="too few for a cache"):
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
            pipe.apply([FeatureCache(site=site) for site in pair])  # type: ignore[arg-type]


def test_bfloat16_comes_back_as_bfloat16() -> None:
    for site in SITES:
        pipe = make("flux")
        pipe.transformer.to(torch.bfloat16)
        kwargs = call_kwargs("flux", pipe, steps=8)
        kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        wrapped = DiffEffPipeline(pipe, [FeatureCache(site=site)])  # type: ignore[arg-type]
        found = wrapped(**kwargs, return_dict=False)[0]
        assert found.dtype is torch.bfloat16 and torch.isfinite(found).all()
