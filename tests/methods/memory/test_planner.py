"""The ladder: its order, the step that fits, refusals with numbers, and calls kept within a budget."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from diffeff import ConfigError, DiffEffPipeline, MemoryBudgetError, Plan
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.memory.estimate import Estimate, Stage
from diffeff.methods.memory.estimate_offload import LINK, follow
from diffeff.methods.memory.feature_slicing import FeatureSlicing
from diffeff.methods.memory.ladder import Rung, put_on, rungs
from diffeff.methods.memory.planner import MemoryGoal, MemoryPlan, plan_memory
from diffeff.methods.quantization.int8_weights import Int8Weights

SIZE = {"steps": 1, "size": (4, 8, 12)}


def animated() -> DiffEffPipeline:
    return DiffEffPipeline(tiny.make("animatediff"))


def call(pipe: DiffEffPipeline, **options: Any) -> dict[str, Any]:
    return tiny.call_kwargs("animatediff", pipe, **(SIZE | options))


def planned(pipe: DiffEffPipeline, budget: int, **goal: Any) -> MemoryPlan:
    """A plan in which the process itself counts nothing, so that budgets of a test mean tensors."""
    goal_ = MemoryGoal(memory=budget, **goal)
    return plan_memory(pipe.wrapped, pipe.denoisers, pipe.plan.methods, goal_, call(pipe))


# --- order --------------------------------------------------------------------------------------------------------
def names(**options: Any) -> list[str]:
    asked = (FeatureCache(),)
    return [r.name for r in rungs(asked, 10_000_000, 1_000_000, **({"accelerator": False} | options))]


def test_ladder_goes_from_cheap_to_costly() -> None:
    found = names(accelerator=True, quantization=True)
    order = [
        "as asked", "feature slicing", "feature slicing to the budget", "VAE tiles", "snapshots in host memory",
        "parts in host memory", "blocks in host memory", "int8 weights",
    ]  # fmt: skip
    assert [name for name in found if name in order] == order


def test_offload_needs_an_accelerator_and_int8_a_permission() -> None:
    assert not {"parts in host memory", "snapshots in host memory", "int8 weights"} & set(names())
    assert names(quantization=True)[-1] == "int8 weights"


def test_a_slicing_of_ones_own_is_not_doubled() -> None:
    found = list(rungs((FeatureSlicing(slices=2),), 10_000_000, 1_000_000, accelerator=False))
    assert "feature slicing" not in [r.name for r in found]
    assert all(sum(isinstance(m, FeatureSlicing) for m in r.methods) == 1 for r in found)


def test_int8_on_a_cpu_puts_the_float_weights_on_disk() -> None:
    last = list(rungs((), 10_000_000, 1_000_000, accelerator=False, quantization=True))[-1]
    (int8,) = (m for m in last.methods if isinstance(m, Int8Weights))
    assert int8.keep_original == "disk"


# --- plans --------------------------------------------------------------------------------------------------------
def test_a_large_budget_changes_nothing() -> None:
    plan = planned(animated(), 10**9)
    assert plan.chosen.rung.name == "as asked"
    assert plan.chosen.rung.methods == ()


def test_a_smaller_budget_takes_the_first_step_that_fits() -> None:
    pipe = animated()
    plain = planned(pipe, 10**9).predicted
    budget = plain.peak - plain.activations // 4
    plan = planned(pipe, budget)
    assert plan.predicted.peak <= budget
    assert all(s.estimate is None or s.estimate.peak > budget for s in plan.steps[:-1])
    assert any(isinstance(m, FeatureSlicing) for m in plan.chosen.rung.methods)
    assert plan.chosen.ratio is not None
    assert pipe.plan == Plan()  # planning changed nothing


def test_a_refusal_gives_the_numbers() -> None:
    pipe = animated()
    weights = sum(planned(pipe, 10**9).predicted.weights.values())
    with pytest.raises(MemoryBudgetError) as refused:
        planned(pipe, weights + 1000)
    text = str(refused.value)
    assert f"does not fit {weights / 1e6:.1f} MB" in text
    assert "the least is" in text
    assert "stage that binds is denoise" in text
    assert "fewer frames" in text
    assert "allow_quantization=True" in text


def test_quantization_only_if_allowed() -> None:
    pipe = DiffEffPipeline(tiny.make("wan"))
    goal = MemoryGoal(memory=1000, allow_quantization=True)
    with pytest.raises(MemoryBudgetError, match="does not fit") as refused:
        plan_memory(pipe.wrapped, pipe.denoisers, (), goal, tiny.call_kwargs("wan", pipe, steps=2))
    assert "allow_quantization" not in str(refused.value)


def test_plan_is_json() -> None:
    import json

    found = json.loads(json.dumps(planned(animated(), 10**9).to_dict()))
    assert found["steps"][0]["step"] == "as asked"
    assert found["predicted"]["stages"]["denoise"]["total"] > 0


@pytest.mark.parametrize("bad", ["much", "0GB", -1])
def test_nonsense_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="memory"):
        animated().apply(memory=bad)


def test_auto_takes_nine_tenths_of_what_is_free() -> None:
    assert MemoryGoal().budget(1000) == 900
    with pytest.raises(ConfigError, match="auto"):
        MemoryGoal().budget(None)


# --- steps that move weights away -----------------------------------------------------------------------------------
def estimate(**weights: int) -> Estimate:
    def stage(*parts: str) -> Stage:
        return Stage(sum(weights.values()), 100, 20, 0, 0, "aten::mm", parts, 4, 9, 1.0)

    return Estimate("cuda:0", {"text": stage("text_encoder"), "denoise": stage("unet")}, weights)


def test_parts_in_host_memory_leave_those_at_work() -> None:
    pipe = DiffEffPipeline(tiny.make("sd"))
    found = follow(Rung("x", (), ("model_offload",)), [estimate(text_encoder=1000, unet=2000)], pipe.denoisers)
    assert {name: s.weights for name, s in found.stages.items()} == {"text": 1000, "denoise": 2000}
    assert found.seconds == pytest.approx(2.0 + 3000 / LINK)


def test_blocks_in_host_memory_leave_two() -> None:
    pipe = DiffEffPipeline(tiny.make("wan"))
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    blocks = [sum(p.nbytes for p in b.module.parameters()) for b in pipe.denoisers[0].blocks]
    before = Estimate("cuda:0", {"denoise": Stage(weights, 1, 0, 0, 0, "", ("transformer",), 3, 9, 1.0)}, {})
    before = Estimate(before.device, before.stages, {"transformer": weights})
    found = follow(Rung("x", (), ("group_offload",)), [before], pipe.denoisers)
    assert found.stages["denoise"].weights == weights - sum(blocks) + 2 * max(blocks)


def test_int8_takes_a_byte_each_and_four_per_output() -> None:
    pipe = DiffEffPipeline(tiny.make("wan"))
    config = Int8Weights(min_features=8)
    weights = sum(t.nbytes for t in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    before = Estimate("cpu", {"denoise": Stage(weights, 1, 0, 0, 0, "", ("transformer",), 3, 9, 1.0)}, {})
    before = Estimate(before.device, before.stages, {"transformer": weights})
    found = follow(Rung("x", (config,)), [before], pipe.denoisers)
    pipe.apply(Plan([Int8Weights(min_features=8, keep_original="disk")]))
    kept = sum(t.nbytes for t in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    pipe.remove()
    assert found.stages["denoise"].weights == pytest.approx(kept, rel=0.01)
    assert kept < 0.6 * weights


def test_actions_come_off_again() -> None:
    pipe = tiny.make("animatediff-sdxl")
    before = {name: dict(vars(m)) for name, m in pipe.unet.named_modules()}
    undo = put_on(pipe, ("vae_tiling", "group_offload"), torch.device("cpu"))
    assert pipe.vae.use_tiling
    assert any(hasattr(m, "_diffusers_hook") for m in pipe.unet.modules())
    undo()
    assert not pipe.vae.use_tiling
    assert {name: vars(m).keys() for name, m in pipe.unet.named_modules()} == {k: v.keys() for k, v in before.items()}


# --- calls under a budget -----------------------------------------------------------------------------------------
def test_calls_under_a_budget_give_the_plain_result() -> None:
    plain = animated()
    expected = plain(**call(plain)).frames
    pipe = animated().apply(memory="20GB")
    assert torch.equal(pipe(**call(pipe)).frames, expected)
    assert pipe.memory_plan is not None
    assert pipe.memory_plan.chosen.rung.name == "as asked"
    pipe.remove()
    assert pipe.memory_plan is None


def test_another_size_is_planned_anew() -> None:
    pipe = animated().apply(memory="20GB")
    peaks = []
    for frames in (2, 4):
        pipe(**call(pipe, size=(frames, 8, 8), steps=1))
        assert pipe.memory_plan is not None
        peaks.append(pipe.memory_plan.predicted.activations)
    first = pipe.memory_plan
    pipe(**call(pipe, size=(4, 8, 8), steps=2))  # the number of steps changes no size
    assert pipe.memory_plan is first
    assert peaks[1] > 1.5 * peaks[0]


def test_a_call_that_cannot_fit_never_starts() -> None:
    pipe = animated().apply(memory="1MB")
    seen: list[int] = []
    pipe.wrapped.unet.register_forward_hook(lambda *_: seen.append(1))  # hooks see no dry run
    with pytest.raises(MemoryBudgetError, match="does not fit"):
        pipe(**call(pipe))
    assert seen == []
