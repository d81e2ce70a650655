"""Bad input gets one clear error and leaves nothing behind; a fault in mid-run leaves the next run fresh."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, call_kwargs, make, run

from diffeff.errors import (
    ArtefactError,
    AttachedModelError,
    ConfigError,
    DiffEffError,
    DiffEffWarning,
    ForeignPatchError,
    MethodInapplicable,
    ModelLoadError,
    OutputError,
    PlanFormatError,
    RunInProgress,
    UnknownName,
)
from diffeff.methods import FeatureCache, GuidanceSkip, Int8Weights
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import ModelStamp, Plan

FOUR = ["wan", "cogvideox", "flux", "sd"]
CACHE = FeatureCache(site="step", interval=2, first=1, last=1)


def call_in(dtype: torch.dtype, family: str, pipe: Any, **options: Any) -> dict[str, Any]:
    """A call whose tensors have the pipeline's precision, as diffusers expects of embeddings that are passed in."""
    named = call_kwargs(family, pipe, **options)
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in named.items()}


def denoiser_of(pipe: Any) -> torch.nn.Module:
    module: torch.nn.Module = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    return module


# --- names and values -----------------------------------------------------------------------------------------------
def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(UnknownName, match="'balanced'"):
        Plan.of("balancd")
    with pytest.raises(UnknownName, match="'feature_cache'"):
        Plan.of({"diffeff_plan": 1, "methods": [{"use": "feature_cash"}]})
    with pytest.raises(UnknownName, match="'interval'"):
        Plan.of({"diffeff_plan": 1, "methods": [{"use": "feature_cache", "intervall": 2}]})
    with pytest.raises(UnknownName, match="'sprites-wan'"):
        DiffEffPipeline.from_pretrained("sprites-wann")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "diffeff_plan"),
        ({"diffeff_plan": 99}, "version 99"),
        ({"diffeff_plan": 1, "metods": []}, "'methods'"),
        ({"diffeff_plan": 1, "methods": {}}, "expected a list"),
        ({"diffeff_plan": 1, "methods": ["x"]}, '"use"'),
        ({"diffeff_plan": 1, "model": {"family": "wan"}}, "fingerprint"),
        ({"diffeff_plan": 1, "artefacts": {"a": {"path": "x"}}}, "sha256"),
    ],
)
def test_malformed_plans_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        Plan.from_dict(data)


def test_plan_files_that_are_no_plans(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"diffeff_plan": 1,')
    with pytest.raises(PlanFormatError, match=r"broken\.json"):
        Plan.load(broken)
    with pytest.raises(PlanFormatError, match="no plan file"):
        Plan.load(tmp_path / "absent.json")


@pytest.mark.parametrize(("field", "value"), [("interval", 0), ("threshold", -1.0), ("site", "sky"), ("interval", 1.5)])
def test_values_out_of_range_name_field_value_and_range(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        FeatureCache(**{field: value})
    text = str(caught.value)
    assert f"feature_cache.{field}" in text
    assert repr(value) in text
    assert "allowed" in text


def test_plan_round_trip(tmp_path: Path) -> None:
    plan = Plan([CACHE, GuidanceSkip(), Int8Weights()], ModelStamp("wan", "0" * 16, "UniPC", 30, (64, 64)))
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    assert again.digest == plan.digest


def test_plan_for_another_model_warns_with_both_fingerprints() -> None:
    pipe = DiffEffPipeline(make("wan"))
    with pytest.warns(DiffEffWarning, match="0123456789abcdef"):
        pipe.apply(Plan([CACHE], ModelStamp("flux", "0123456789abcdef")))


def test_too_few_steps_for_a_cache() -> None:
    pipe = DiffEffPipeline(make("wan"), plan=[FeatureCache(site="step", first=3, last=2)])
    with pytest.raises(MethodInapplicable, match="4 steps are too few for a cache"):
        run("wan", pipe, steps=4)
    fresh = run("wan", DiffEffPipeline(make("wan"), plan=[FeatureCache(site="step", first=3, last=2)]), steps=10)
    assert torch.equal(run("wan", pipe, steps=10), fresh)


def test_a_pipeline_is_what_is_wrapped() -> None:
    with pytest.raises(DiffEffError, match="from_pretrained"):
        DiffEffPipeline(torch.nn.Linear(2, 2))


# --- folders --------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    DiffEffPipeline(make("dit")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


def test_truncated_weights(folder: Path) -> None:
    file = weights(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="truncated"):
        DiffEffPipeline.from_pretrained(folder)


def test_corrupted_header(folder: Path) -> None:
    file = weights(folder)
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ModelLoadError, match="corrupted"):
        DiffEffPipeline.from_pretrained(folder)


def test_pickled_weights_are_refused_with_the_opt_out_named(folder: Path) -> None:
    file = weights(folder)
    from safetensors.torch import load_file

    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ModelLoadError, match="use_safetensors=False"):
        DiffEffPipeline.from_pretrained(folder)


def test_missing_component(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelLoadError, match="'vae'"):
        DiffEffPipeline.from_pretrained(folder)


def test_not_a_pipeline_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model_index\.json"):
        DiffEffPipeline.from_pretrained(tmp_path)


def test_code_in_a_folder_needs_consent(folder: Path) -> None:
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["transformer"] = ["mine", "Mine"]
    index.write_text(json.dumps(entries))
    (folder / "transformer" / "mine.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        DiffEffPipeline.from_pretrained(folder)


def test_saved_plan_and_artefacts_come_back(tmp_path: Path) -> None:
    pipe = DiffEffPipeline(make("dit"), plan=[CACHE, Int8Weights(min_features=8)])
    expected = run("dit", pipe)
    pipe.save_pretrained(tmp_path / "model")
    again = DiffEffPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert [m.name for m in again.plan.methods] == ["feature_cache", "int8_weights"]
    assert torch.equal(run("dit", again), expected)
    artefact = next((tmp_path / "model").glob("diffeff_*.safetensors"))
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtefactError, match="sha256"):
        DiffEffPipeline.from_pretrained(tmp_path / "model")


def test_plain_diffusers_loads_a_saved_folder(tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    pipe = make("dit")
    plain = run("dit", pipe)
    DiffEffPipeline(pipe, plan=[Int8Weights(min_features=8)]).save_pretrained(tmp_path / "model")
    loaded = DiTPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run("dit", loaded), plain)


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        DiffEffPipeline(make("dit")).save_pretrained(blocked)
    with pytest.raises(OutputError, match="cannot write"):
        Plan([CACHE]).save(blocked / "plan.json")


# --- copies and other people's patches ------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FOUR)
def test_copy_and_pickle_are_refused_while_attached(family: str) -> None:
    pipe = DiffEffPipeline(make(family), plan=[CACHE])
    with pytest.raises(AttachedModelError, match="remove"):
        copy.deepcopy(denoiser_of(pipe))
    with pytest.raises(AttachedModelError, match="remove"):
        pickle.dumps(denoiser_of(pipe))
    pipe.remove()
    copy.deepcopy(denoiser_of(pipe))


def test_a_foreign_patch_on_top_stops_remove_and_nothing_is_lost() -> None:
    pipe = DiffEffPipeline(make("wan"), plan=[CACHE])
    denoiser = denoiser_of(pipe)
    ours = denoiser.forward
    denoiser.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ForeignPatchError, match="WanTransformer3DModel"):
        pipe.remove()
    denoiser.forward = ours
    pipe.remove()
    assert "forward" not in denoiser.__dict__


def test_two_pipelines_that_share_a_denoiser() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    first = make("sd")
    plain = run("sd", first)
    accelerated = DiffEffPipeline(first, plan=[CACHE])
    expected = run("sd", accelerated)
    second = StableDiffusionImg2ImgPipeline(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    second.set_progress_bar_config(disable=True)
    with pytest.raises(AttachedModelError, match="already carries"):
        DiffEffPipeline(second, plan=[CACHE])
    shared = run("sd-img2img", second)
    assert torch.equal(run("sd", accelerated), expected)
    accelerated.remove()
    assert torch.equal(run("sd-img2img", second), shared)
    assert torch.equal(run("sd", first), plain)


# --- runs -----------------------------------------------------------------------------------------------------------
class Stop(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("family", FOUR)
def test_a_fault_inside_the_denoiser_at_any_step(family: str, step: int, error: type[BaseException]) -> None:
    plan = Plan([FeatureCache(site="segment", interval=2, first=1, last=1)])
    fresh = run(family, DiffEffPipeline(make(family), plan=plan), seed=1)
    pipe = DiffEffPipeline(make(family), plan=plan)
    block = pipe.denoisers[0].blocks[0].module
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise error

    hook = block.register_forward_pre_hook(fail)
    with pytest.raises(error):
        run(family, pipe)
    hook.remove()
    assert torch.equal(run(family, pipe, seed=1), fresh)


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("change", ["size", "steps", "batch", "dtype", "scheduler", "guidance"])
def test_a_change_between_runs_is_a_fresh_run(family: str, change: str) -> None:
    plan = Plan([CACHE])
    pipe = DiffEffPipeline(make(family), plan=plan)
    run(family, pipe)
    fresh = DiffEffPipeline(make(family), plan=plan)
    options: dict[str, Any] = {}
    for one in (pipe, fresh):
        if change == "dtype":
            one.to(torch.bfloat16)
        elif change == "scheduler":
            one.scheduler = type(one.scheduler).from_config(one.scheduler.config)
    if change in ("size", "steps", "batch", "guidance"):
        small = (FAMILIES[family].size[0], 4, 8)
        options = {
            "size": {"size": small},
            "steps": {"steps": 9},
            "batch": {"batch": 2},
            "guidance": {"guidance": False},
        }[change]
    dtype = torch.bfloat16 if change == "dtype" else torch.float32
    results = [one(**call_in(dtype, family, one, **options), return_dict=False)[0] for one in (pipe, fresh)]
    assert torch.equal(*results)
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged


def test_late_start_counts_from_the_first_step_taken() -> None:
    pipe = DiffEffPipeline(make("sd-img2img"), plan=[FeatureCache(site="step", interval=2, first=2, last=1)])
    run("sd-img2img", pipe, steps=12)
    assert pipe.report is not None
    share = pipe.report.steps["cond"]
    assert share.total < 12
    assert share.computed < share.total


def test_one_run_at_a_time() -> None:
    pipe = DiffEffPipeline(make("wan"), plan=[CACHE])
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> dict[str, Any]:
        inside.set()
        go_on.wait(20)
        return {}

    worker = threading.Thread(target=lambda: pipe(**call_kwargs("wan", pipe), callback_on_step_end=wait))
    worker.start()
    try:
        assert inside.wait(20)
        with pytest.raises(RunInProgress):
            run("wan", pipe)
        with pytest.raises(RunInProgress):
            pipe.remove()
        with pytest.raises(RunInProgress):
            pipe.apply("lossless")
    finally:
        go_on.set()
        worker.join()
    assert torch.equal(run("wan", pipe), run("wan", DiffEffPipeline(make("wan"), plan=[CACHE])))


def test_the_pipelines_own_interrupt_ends_cleanly() -> None:
    pipe = DiffEffPipeline(make("wan"), plan=[CACHE])
    fresh = run("wan", pipe)

    def interrupt(inner: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        inner._interrupt = index >= 2
        return kwargs

    pipe(**call_kwargs("wan", pipe), callback_on_step_end=interrupt)
    assert pipe.report is not None
    assert pipe.report.steps["cond"].total == 3
    assert torch.equal(run("wan", pipe), fresh)


def test_a_pipeline_used_directly_is_accelerated_too() -> None:
    pipe = make("wan")
    accelerated = DiffEffPipeline(pipe, plan=[CACHE])
    assert torch.equal(run("wan", pipe), run("wan", accelerated))


def test_the_wrapped_interface() -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline

    pipe = DiffEffPipeline(make("sd"), plan=[CACHE])
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.to(torch.float32) is pipe
    assert pipe.components.keys() == pipe.wrapped.components.keys()
    steps: list[int] = []
    pipe(**call_kwargs("sd", pipe), callback_on_step_end=lambda p, i, t, k: steps.append(i) or k)
    assert steps == list(range(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.unet is pipe.unet
    pipe.scheduler.config  # noqa: B018 (reads through)
    pipe.custom = 3
    assert pipe.wrapped.custom == 3


def test_model_offload_keeps_the_seams() -> None:
    expected = run("wan", DiffEffPipeline(make("wan"), plan=[CACHE]))
    accelerate = pytest.importorskip("accelerate")
    pipe = make("wan")
    hook = accelerate.hooks.ModelHook()
    accelerate.hooks.add_hook_to_module(pipe.transformer, hook)
    wrapped = DiffEffPipeline(pipe, plan=[CACHE])
    assert torch.equal(run("wan", wrapped), expected)
    accelerate.hooks.remove_hook_from_module(pipe.transformer)
    accelerate.hooks.add_hook_to_module(pipe.transformer, hook)
    assert torch.equal(run("wan", wrapped), expected)
    assert wrapped.report is not None
    assert wrapped.report.methods[0].engaged
    wrapped.remove()
    accelerate.hooks.remove_hook_from_module(pipe.transformer)
