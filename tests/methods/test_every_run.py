"""What must not carry over between runs, for every method of the table: interrupts, other shapes and schedulers, rows
of a batch, and what few-step models are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from every import CONFIGS, STEPS, applied, attempt, home, label, plain
from rows import RowByRow, rows_of
from tiny import call_kwargs, make, run

from diffeff.core.config import Config
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.caching.few_steps import FEW
from diffeff.methods.caching.published.easycache import EasyCache
from diffeff.methods.caching.published.seacache import SeaCache
from diffeff.methods.caching.recipe import CacheConfig
from diffeff.pipeline import DiffEffPipeline

REFUSED = (MethodInapplicable, ConfigError)


def result(pipe: Any, family: str, **options: Any) -> torch.Tensor | str:
    """What a run gives, or why it is refused."""
    try:
        return run(family, pipe, steps=STEPS, **options)
    except REFUSED as error:
        return str(error)


def same(found: torch.Tensor | str, expected: torch.Tensor | str) -> bool:
    """The same tensor bit for bit, or the same refusal."""
    if isinstance(found, str) or isinstance(expected, str):
        return found == expected
    return bool(torch.isfinite(found).all()) and torch.equal(found, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_an_interrupted_run_of_another_shape_leaves_nothing(config: Config) -> None:
    family = home(config)
    pipe = applied(config, family)

    def stop(pipeline: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == STEPS // 2:
            raise InterruptedError
        return kwargs

    with pytest.raises(InterruptedError):
        pipe(**call_kwargs(family, pipe, batch=2, steps=STEPS), callback_on_step_end=stop)
    assert same(result(pipe, family), attempt(config, family))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_runs_of_other_shapes_equal_those_of_a_fresh_pipeline(config: Config) -> None:
    family = home(config)
    pipe, other = applied(config, family), {"size": (8, 8), "batch": 2, "seed": 1}
    assert same(result(pipe, family), attempt(config, family))
    assert same(result(pipe, family, **other), result(applied(config, family), family, **other))
    assert same(result(pipe, family), attempt(config, family))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_applying_the_same_plan_again_changes_nothing(config: Config) -> None:
    """The new plan takes the old one's place; two of a kind within one plan are tested in test_every_method."""
    family = home(config)
    pipe = applied(config, family).apply([config])
    assert same(result(pipe, family), attempt(config, family))
    pipe.remove().remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain(family))


def other_scheduler(family: str, before: Any) -> Any:
    """A scheduler of another kind for the same model: multistep on Wan, two evaluations per step on Stable Diffusion,
    other noise levels on Flux."""
    if family == "wan":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    if family == "sd":
        return diffusers.HeunDiscreteScheduler.from_config(before.config)
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(before.config, use_karras_sigmas=True)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 about their schedulers
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_another_scheduler_between_runs_is_as_if_it_had_always_been_there(config: Config) -> None:
    family = home(config)
    pipe, bare = applied(config, family), make(family)
    before = pipe.wrapped.scheduler
    run(family, pipe, steps=STEPS)
    pipe.wrapped.scheduler = other_scheduler(family, before)
    bare.scheduler = other_scheduler(family, before)
    assert same(result(pipe, family), result(DiffEffPipeline(bare, [config]), family))
    pipe.wrapped.scheduler = before
    assert same(result(pipe, family), attempt(config, family))


# --- rows of a batch ----------------------------------------------------------------------------------------------
APART = (
    ("wan", FeatureCache(policy="threshold", threshold=0.25, per_row=True, first=1, last=1)),
    ("sd", FeatureCache(policy="threshold", threshold=0.2, per_row=True, first=1, last=1)),
    ("flux-cfg", FeatureCache(policy="threshold", threshold=0.2, per_row=True, first=1, last=1)),
    ("wan", EasyCache(threshold=0.25, warmup=0.0, per_row=True)),
    ("flux-cfg", EasyCache(threshold=0.3, warmup=0.0, per_row=True)),
    ("wan", SeaCache(site="step", threshold=1.6, per_row=True)),
    ("flux-cfg", SeaCache(site="step", threshold=0.2, per_row=True)),
)
"""Caches whose rows decide apart, at thresholds at which the four rows do not agree."""
AGREEING = {"int8_weights": {"kernel": "int_mm"}}
"""Options at which runs of other shapes agree to the bit: int8_weights chooses kernels by the number of rows."""


def batches(config: Config, family: str) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Four rows made together, the same rows made alone, and the reports of all five runs."""
    pipe, reports = applied(config, family), []
    found = []
    with RowByRow(), torch.no_grad():
        for rows in ((0, 1, 2, 3), (0,), (1,), (2,), (3,)):
            found.append(pipe(**rows_of(family, pipe, rows, steps=STEPS), return_dict=False)[0])
            reports.append(pipe.report)
    return found[0], torch.cat(found[1:]), reports


def skipped(report: Any) -> list[Any]:
    """Steps skipped, by denoiser."""
    return [row["skipped_steps"] for row in report.methods[0].details.values() if isinstance(row, dict)]


@pytest.mark.parametrize("family", ["wan", "sd", "flux-cfg"])
def test_rows_of_a_plain_batch_are_comparable(family: str) -> None:
    """Bit for bit, which is what makes the tests below mean anything."""
    pipe = make(family)
    with RowByRow(), torch.no_grad():
        together = pipe(**rows_of(family, pipe, range(4), steps=3), return_dict=False)[0]
        alone = [pipe(**rows_of(family, pipe, (row,), steps=3), return_dict=False)[0] for row in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_batch_of_four_equals_four_runs_or_is_said_to_decide_as_one(config: Config) -> None:
    """Decisions known beforehand are every row's. What measures inside the denoiser decides once for all rows, because
    they go through its blocks together: the report says so."""
    decides = getattr(config.build(), "decides", "beforehand")
    together, alone, reports = batches(replace(config, **AGREEING.get(config.name, {})), home(config))
    if decides == "beforehand":
        assert torch.equal(together, alone)
        return
    assert decides == "batch together"
    assert reports[0].methods[0].details["decided"] == decides
    assert reports[0].methods[0].engaged


@pytest.mark.parametrize(("family", "config"), APART, ids=lambda part: part if isinstance(part, str) else part.name)
def test_rows_that_decide_apart_equal_their_single_runs_bit_for_bit(family: str, config: Config) -> None:
    together, alone, reports = batches(config, family)
    assert torch.equal(together, alone)
    assert reports[0].methods[0].details["decided"] == "rows apart"
    patterns = [skipped(report) for report in reports[1:]]
    assert any(pattern != patterns[0] for pattern in patterns), "the rows agree: the test shows nothing"


# --- few-step models ----------------------------------------------------------------------------------------------
HELP = ("int8_weights", "kv_downsample", "guidance_skip")
CACHES = [config for config in CONFIGS if isinstance(config, CacheConfig) or config.name == "scheduled_cache"]


def told(pipe: Any, family: str, steps: int) -> list[str]:
    """The refusal of a run, or the warnings of its report."""
    try:
        run(family, pipe, steps=steps)
    except MethodInapplicable as error:
        return [str(error)]
    return list(pipe.report.warnings)


@pytest.mark.parametrize("config", [*CACHES, FeatureCache(), EasyCache()], ids=label)
def test_four_steps_are_refused_or_told_what_still_helps(config: Config) -> None:
    family = home(config)
    found = told(applied(config, family), family, 4)
    assert any(all(word in text for word in HELP) for text in found), found


def test_protected_steps_that_are_the_whole_run_are_refused() -> None:
    for config, steps in ((FeatureCache(), 4), (FeatureCache(first=5, last=5), 10), (EasyCache(warmup=0.9), 10)):
        with pytest.raises(MethodInapplicable, match=f"{config.name}: {steps} steps are too few"):
            run("wan", applied(config, "wan"), steps=steps)


def test_runs_of_more_steps_are_not_lectured() -> None:
    pipe = applied(FeatureCache(), "wan")
    for steps, cautious in ((FEW, True), (FEW + 1, False)):
        run("wan", pipe, steps=steps)
        assert pipe.report is not None
        assert any("still helps" in text for text in pipe.report.warnings) is cautious
