"""The estimate says what a run really holds, for every family, size and method; and leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import small
import tiny
import torch

from diffeff import DiffEffPipeline, MemoryBudgetError, Plan
from diffeff.methods.memory.estimate import Estimate
from diffeff.methods.memory.estimate_call import sized_call
from diffeff.methods.memory.estimate_scratch import scratch_bytes
from diffeff.methods.memory.live import live_activations
from diffeff.zoo import bundled


def pipeline(name: str, *methods: dict[str, Any]) -> DiffEffPipeline:
    plan = Plan.from_dict({"diffeff_plan": 1, "methods": list(methods)})
    return DiffEffPipeline(tiny.make(name), plan)


def both(name: str, *methods: dict[str, Any], **options: Any) -> tuple[Estimate, int]:
    """The estimate of a call, and the peak of live tensors when it is run."""
    pipe = pipeline(name, *methods)
    if getattr(pipe.wrapped, "vae", None) is not None:
        options["output_type"] = "np"
    estimate = pipe.estimate_memory(**tiny.call_kwargs(name, pipe, **options))
    with torch.no_grad(), live_activations() as live:
        pipe(**tiny.call_kwargs(name, pipe, **options))
    return estimate, live.peak


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan", {"size": (2, 16, 12), "batch": 2}),
        ("wan", {"guidance": False}),
        ("flux", {"size": (16, 24)}),
        ("dit", {}),
        ("sd", {"size": (16, 8)}),
        ("sd-controlnet", {}),
        ("animatediff", {"size": (3, 8, 16), "guidance": False}),
    ],
)
def test_estimate_is_the_peak_of_live_tensors(name: str, options: dict[str, Any]) -> None:
    estimate, peak = both(name, steps=3, **options)
    assert estimate.activations == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("name", ["wan-i2v", "animatediff-sdxl"])
def test_stages_of_pipelines_with_an_autoencoder(name: str) -> None:
    estimate, peak = both(name, steps=2)
    assert estimate.activations == pytest.approx(peak, rel=0.03)
    assert {"denoise", "decode"} <= estimate.stages.keys()
    assert ("encode" in estimate.stages) == (name != "animatediff-sdxl")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("wan", "feature_cache"),
        ("wan", "taylorseer"),
        ("wan", "kv_downsample"),
        ("wan", "guidance_skip"),
        ("sd", "deepcache"),
        ("sd", "fora"),
    ],
)
def test_estimate_counts_what_methods_keep(name: str, method: str) -> None:
    estimate, peak = both(name, {"use": method, **small.SMALL.get(method, {})}, steps=8)
    assert estimate.activations == pytest.approx(peak, rel=0.1)


def test_snapshots_stand_apart() -> None:
    """A cache of the last call's output holds one latent per branch."""
    plain, _ = both("wan", steps=8)
    cached, _ = both("wan", {"use": "feature_cache", "predictor": "hold"}, steps=8)
    assert plain.stages["denoise"].snapshots == 0
    assert cached.stages["denoise"].snapshots >= 2 * 4 * 3 * 8 * 12 * 4


def test_more_frames_need_more() -> None:
    pipe = pipeline("animatediff")
    calls = [tiny.call_kwargs("animatediff", pipe, steps=1, size=(n, 8, 8)) for n in (2, 4)]
    peaks = [pipe.estimate_memory(**call).activations for call in calls]
    assert 1.8 < peaks[1] / peaks[0] < 2.05


def test_weights_by_part_and_in_all() -> None:
    estimate, _ = both("sd", steps=2)
    pipe = tiny.make("sd")
    weights = sum(p.nbytes for p in pipe.unet.parameters())
    assert estimate.weights == {"unet": weights}
    assert estimate.stages["denoise"].weights == weights
    assert estimate.peak == estimate.stages[estimate.binding].total + estimate.process


def test_estimate_leaves_no_trace() -> None:
    pipe = pipeline("wan-i2v", {"use": "feature_cache", "first": 1, "last": 1})
    call = tiny.call_kwargs("wan-i2v", pipe, steps=4)
    components = pipe.wrapped.components
    states = {n: dict(vars(m)) for n, m in components.items() if isinstance(m, torch.nn.Module)}
    random = call["generator"].get_state(), torch.get_rng_state()
    scheduler = pipe.wrapped.scheduler
    pipe.estimate_memory(**call)
    assert pipe.wrapped.scheduler is scheduler
    assert torch.equal(call["generator"].get_state(), random[0])
    assert torch.equal(torch.get_rng_state(), random[1])
    for name, before in states.items():
        after = vars(components[name])
        assert before.keys() == after.keys()
        assert all(type(after[k]) is type(v) for k, v in before.items())
    fresh = pipeline("wan-i2v", {"use": "feature_cache", "first": 1, "last": 1})
    results = [p(**tiny.call_kwargs("wan-i2v", p, steps=4), return_dict=False)[0] for p in (pipe, fresh)]
    assert torch.equal(*results)


def test_a_call_that_cannot_be_traced_says_so() -> None:
    pipe = pipeline("wan")
    call = tiny.call_kwargs("wan", pipe) | {"prompt_embeds": torch.zeros(1, 7, 5)}
    with pytest.raises(MemoryBudgetError, match="cannot be estimated"):
        pipe.estimate_memory(**call)
    assert "forward" not in vars(pipe.wrapped.transformer) or pipe.remove() is pipe


def test_bundled_model_from_a_size_alone() -> None:
    pipe = DiffEffPipeline.from_pretrained("sprites-wan")
    pipe.set_progress_bar_config(disable=True)
    call = sized_call(pipe.wrapped, {"num_inference_steps": 2, "output_type": "np"}, height=32, width=48, frames=9)
    estimate = pipe.estimate_memory(**call)
    with live_activations() as live:
        pipe(**call)
    assert list(estimate.stages) == ["text", "denoise", "decode"]
    assert estimate.activations == pytest.approx(live.peak, rel=0.03)


def test_half_precision_weighs_half() -> None:
    pipe = DiffEffPipeline(tiny.make("sd").to(torch.bfloat16))
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in tiny.call_kwargs("sd", pipe).items()}
    full, _ = both("sd")
    half = pipe.estimate_memory(**call)
    assert 2 * half.weights["unet"] == full.weights["unet"]
    assert 0.4 < half.activations / full.activations < 0.6


def convolution(x: torch.Tensor, out: torch.Tensor, taps: int) -> int:
    """Scratch of a convolution with these operands, stride and dilation one."""
    weight = torch.empty(out.shape[1], x.shape[1], *(taps,) * (x.ndim - 2), device=x.device)
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    return scratch_bytes("aten::convolution", (x, weight, None, ones, zeros, ones, False, zeros, 1), [out])


@pytest.mark.parametrize(("rows", "taps"), [(2, 3), (1, 3), (1, 1)])
def test_scratch_of_a_convolution(rows: int, taps: int) -> None:
    x, out = torch.empty(rows, 4, 8, 8), torch.empty(rows, 8, 8, 8)
    unfolded = 9 * x.nbytes if taps == 3 else 0  # one row that small is torch's own, which needs none for single pixels
    assert convolution(x, out, taps) == (x.nbytes + out.nbytes if rows == 2 else unfolded)
    assert convolution(x.to("meta"), out.to("meta"), taps) == x.nbytes


def test_operators_without_scratch() -> None:
    x = torch.empty(4, 4)
    assert scratch_bytes("aten::mm", (x, x), [x]) == 0


def test_bundled_names_have_calls() -> None:
    for name in bundled.NAMES:
        takes = sized_call(bundled.load(name), {}, batch=2)
        assert takes.get("prompt", takes.get("class_labels")) in (["a"] * 2, [0] * 2)
