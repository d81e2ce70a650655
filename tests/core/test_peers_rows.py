"""The combinations that other tools get wrong without a word, each either right or refused here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import call_kwargs, make, run

from diffeff.errors import DiffEffError, PlanConflict
from diffeff.methods import FeatureCache, GuidanceSkip, Int8Weights, KVDownsample
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan

STEP = FeatureCache(site="step", interval=2, first=1, last=1)
SEGMENT = FeatureCache(site="segment", interval=2, first=1, last=1)
CACHES = {"step": STEP, "segment": SEGMENT}
FOUR = ["wan", "cogvideox", "flux", "sd"]


class Stop(RuntimeError):
    pass


def stop_at(step: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise Stop
        return kwargs

    return callback


@pytest.mark.parametrize("site", CACHES)
@pytest.mark.parametrize("family", ["wan", "wan-v2v"])
def test_guidance_branches_skip_together_and_keep_their_own_state(family: str, site: str) -> None:
    """PAB on Wan with guidance: the uncond branch reuses the cond attention, cond is never skipped."""
    pipe = DiffEffPipeline(make(family), plan=[CACHES[site]])
    run(family, pipe, steps=8)
    report = pipe.report
    assert report is not None
    shares = report.steps if site == "step" else report.blocks
    assert shares["cond"] == shares["uncond"]
    assert 0 < shares["cond"].computed < shares["cond"].total


@pytest.mark.parametrize("site", CACHES)
@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_run_after_an_interrupted_one_equals_a_fresh_one(family: str, site: str, step: int) -> None:
    """MagCache, TaylorSeer and PAB: up to 3e-1 off after an exception; FBC: ghosts of another prompt."""
    fresh = run(family, DiffEffPipeline(make(family), plan=[CACHES[site]]), seed=1)
    pipe = DiffEffPipeline(make(family), plan=[CACHES[site]])
    with pytest.raises(Stop):
        pipe(**call_kwargs(family, pipe, seed=0), callback_on_step_end=stop_at(step))
    assert torch.equal(run(family, pipe, seed=1), fresh)


@pytest.mark.parametrize("site", CACHES)
@pytest.mark.parametrize("family", FOUR)
def test_batch_two_after_an_interrupted_batch_one(family: str, site: str) -> None:
    """FBC, TaylorSeer, PAB: RuntimeError; MagCache, SeaCache: silently wrong."""
    fresh = run(family, DiffEffPipeline(make(family), plan=[CACHES[site]]), batch=2)
    pipe = DiffEffPipeline(make(family), plan=[CACHES[site]])
    with pytest.raises(Stop):
        pipe(**call_kwargs(family, pipe), callback_on_step_end=stop_at(3))
    assert torch.equal(run(family, pipe, batch=2), fresh)


@pytest.mark.parametrize("family", FOUR)
def test_rows_of_a_batch_decide_apart_when_asked(family: str) -> None:
    """FBC: one decision for the whole batch, so a row differs from its own single run by 2.6e-2.

    That each row equals its single run is tested in methods/caching/test_feature_cache.py.
    """
    config = FeatureCache(site="step", policy="threshold", threshold=0.3, per_row=True, first=1, last=1)
    pipe = DiffEffPipeline(make(family), plan=[config])
    together = run(family, pipe, batch=2)
    assert together.shape[0] == 2
    assert pipe.report is not None
    assert pipe.report.methods[0].details["decided"] == "rows apart"


@pytest.mark.parametrize("site", CACHES)
@pytest.mark.parametrize("family", FOUR)
def test_same_call_twice_and_other_steps_between(family: str, site: str) -> None:
    """MagCache needs a new config for another number of steps, and does not say so."""
    pipe = DiffEffPipeline(make(family), plan=[CACHES[site]])
    first = run(family, pipe, steps=8)
    run(family, pipe, steps=5)
    run(family, pipe, steps=12)
    run(family, pipe, steps=8, batch=2)
    assert torch.equal(run(family, pipe, steps=8), first)


@pytest.mark.parametrize("family", ["wan", "sd"])
def test_token_methods_are_reproducible(family: str) -> None:
    """tomesd: a second identical call differs (2.5e-2), its private generator advances."""
    pipe = DiffEffPipeline(make(family), plan=[KVDownsample(stride=2, min_tokens=4)])
    assert torch.equal(run(family, pipe), run(family, pipe))


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("site", CACHES)
def test_repeated_timesteps_do_not_alias(name: str, site: str) -> None:
    """DeepCache looks steps up by timestep value: with Heun or PNDM it almost never refreshes."""
    import diffusers

    pipe = DiffEffPipeline(make("sd"), plan=[CACHES[site]])
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    run("sd", pipe, steps=8)
    assert pipe.report is not None
    steps = pipe.report.steps["cond"]
    expected = 2 + (steps.total - 2) / 2  # the first, the last, every second entry between
    computed = steps.computed
    if site == "segment":  # the outermost down and up block are computed at every entry
        blocks, inner = pipe.report.blocks["cond"], len(pipe.denoisers[0].blocks) - 2
        computed = (blocks.computed - 2 * steps.total) / inner
    assert abs(computed - expected) <= 1


def test_applying_twice_is_applying_once() -> None:
    """DeepCache.enable() twice: RecursionError."""
    pipe = DiffEffPipeline(make("sd"), plan=[SEGMENT])
    once = run("sd", pipe)
    pipe.apply([SEGMENT]).apply([SEGMENT])
    assert torch.equal(run("sd", pipe), once)


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("other", [KVDownsample(stride=2, min_tokens=4), Int8Weights(min_features=8)])
def test_cache_with_another_kind_of_method_is_deterministic(family: str, other: Any) -> None:
    """DeepCache + tomesd: not reproducible (3e-2)."""
    pipe = DiffEffPipeline(make(family))
    plan = Plan([SEGMENT, other])
    if not all(row.applies for row in plan.check(pipe.denoisers)):
        pytest.skip("the method finds nothing to act on in this tiny model")
    pipe.apply(plan)
    assert torch.equal(run(family, pipe), run(family, pipe))
    assert pipe.report is not None
    assert all(outcome.engaged for outcome in pipe.report.methods)


@pytest.mark.parametrize("pair", [(STEP, STEP), (SEGMENT, SEGMENT), (STEP, SEGMENT)])
def test_two_caches_on_the_same_work_are_refused_with_a_reason(pair: tuple[Any, Any]) -> None:
    """FBC + cache-dit, cache-dit + PAB: both skip, errors compound (1.7e-1 for 3.4e-2 and 6e-3 alone)."""
    pipe = DiffEffPipeline(make("wan"))
    with pytest.raises(PlanConflict, match="feature_cache and feature_cache"):
        pipe.apply(list(pair))
    assert pipe.plan.methods == ()


def test_a_cache_of_diffusers_is_refused_in_either_order() -> None:
    """FBC + cache-dit in either order: not refused."""
    from diffusers import FirstBlockCacheConfig

    pipe = make("wan")
    plain = run("wan", pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with pytest.raises(PlanConflict, match="disable_cache"):
        DiffEffPipeline(pipe, plan=[STEP])
    pipe.transformer.disable_cache()
    wrapped = DiffEffPipeline(pipe, plan=[STEP])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with pytest.raises(DiffEffError):
        run("wan", wrapped)
    pipe.transformer.disable_cache()
    wrapped.remove()
    assert torch.equal(run("wan", pipe), plain)


def _other_tools_forward(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("tool", "attribute", "module"),
    [
        ("cache-dit", "_is_cached", None),
        ("tomesd", "_tome_info", None),
        ("DeepCache", "forward", "DeepCache.extension"),
    ],
)
def test_marks_of_other_tools_are_refused(
    tool: str, attribute: str, module: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FBC + cache-dit: not refused. The tools are not installed here; these are the marks they leave."""
    pipe = make("sd")
    mark: Any = True
    if module is not None:
        mark = _other_tools_forward
        monkeypatch.setattr(mark, "__module__", module)
    pipe.unet.__dict__[attribute] = mark
    with pytest.raises(PlanConflict, match=tool):
        DiffEffPipeline(pipe, plan=[STEP])


@pytest.mark.parametrize("family", ["wan", "flux", "sd"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_before_and_after(family: str, when: str) -> None:
    """Control LoRA lost after TeaCache; LoRA dropped silently when compile was added."""
    from peft import LoraConfig

    def add(pipe: Any) -> None:
        denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        torch.manual_seed(3)
        denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    plain = make(family)
    add(plain)
    expected = run(family, DiffEffPipeline(plain, plan=[STEP]))
    pipe = DiffEffPipeline(make(family))
    if when == "before":
        add(pipe)
        pipe.apply([STEP])
    else:
        pipe.apply([STEP])
        add(pipe)
    assert torch.equal(run(family, pipe), expected)


@pytest.mark.parametrize("family", FOUR)
def test_group_offload_before_and_after(family: str) -> None:
    """Streamed group offload with quantised weights: device mismatch; FBC + group offload must agree with FBC."""
    expected = run(family, DiffEffPipeline(make(family), plan=[SEGMENT]))
    for order in ("before", "after"):
        pipe = DiffEffPipeline(make(family))
        if order == "after":
            pipe.apply([SEGMENT])
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        if order == "before":
            pipe.apply([SEGMENT])
        assert torch.equal(run(family, pipe), expected)


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("how", ["blocks before", "blocks after", "whole before", "whole after"])
def test_compile_before_and_after(family: str, how: str) -> None:
    """DeepCache "dynamic, incompatible"; a cache after compile silently made it useless."""
    torch._dynamo.reset()
    expected = run(family, DiffEffPipeline(make(family), plan=[SEGMENT]))
    pipe = DiffEffPipeline(make(family))
    denoiser = pipe.unet if hasattr(pipe.wrapped, "unet") else pipe.transformer
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile_now() -> None:
        if how.startswith("blocks"):
            for block in pipe.denoisers[0].blocks:
                block.module.compile(backend=backend)
        else:
            denoiser.compile(backend=backend)

    if how.endswith("before"):
        compile_now()
    pipe.apply([SEGMENT])
    if how.endswith("after"):
        compile_now()
    assert torch.allclose(run(family, pipe), expected, atol=1e-5)
    assert graphs
    made = len(graphs)
    run(family, pipe)
    assert len(graphs) == made  # nothing is compiled again in the second run


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("wan", FeatureCache(site="step", policy="threshold", threshold=1e-9, first=1, last=1)),
        ("sd", GuidanceSkip(policy="adaptive", threshold=1.0)),
    ],
)
def test_a_method_that_did_nothing_says_so(family: str, config: Any) -> None:
    """TaylorSeer's defaults match no layer of Wan, SeaCache is inert outside Cosmos: bit-identical, no word."""
    pipe = DiffEffPipeline(make(family), plan=[config])
    run(family, pipe)
    assert pipe.report is not None
    outcome = pipe.report.methods[0]
    assert not outcome.engaged
    assert outcome.reason
    assert any(outcome.reason in text for text in pipe.report.warnings)
