"""The method feature_slicing on whole pipelines: alone, with others, offloaded, compiled; what it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make, run
from torch import Tensor

from diffeff import DiffEffPipeline, Plan
from diffeff.errors import ConfigError, PlanConflict
from diffeff.methods import FORA, DeepCache, FeatureCache, FeatureSlicing, Int8Weights, KVDownsample
from diffeff.methods.memory.budget import Share, parse_bytes
from diffeff.methods.memory.live import live_activations

STEPS = 4
FAMILIES = ("sd", "sdxl", "sd-controlnet", "sd-img2img", "animatediff", "animatediff-v2v", "svd")


def close(out: Tensor, reference: Tensor, limit: float = 1e-4) -> bool:
    return float((out - reference).norm() / reference.norm()) < limit


# --- budget -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512MB", 512 * 10**6), ("1.5 kB", 1500), (77, 77), ("2TiB", 2 * 2**40)],
)
def test_amounts_of_memory(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "8 PB", "-1GB", "0", "8GBs", "1e9", True])
def test_no_amount_of_memory(text: Any) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)


def test_the_fewest_slices_that_fit() -> None:
    share = Share(100, None)
    assert share.count(16, 5) == 1
    assert share.count(16, 10) == 2
    assert share.count(16, 10, whole=50) == 4
    assert share.count(16, 10, whole=95) == 16
    assert share.count(7, 30) == 3
    assert Share(None, 5).count(3, 10**9) == 3
    assert Share(None, 5).count(16, 1) == 5
    assert Share(None, None).count(16, 10**9) == 1
    for items in range(1, 20):
        n = share.count(items, 11, whole=40)
        assert -(-items // n) * 11 + 40 <= 100
        assert n == 1 or -(-items // (n - 1)) * 11 + 40 > 100


def test_memory_and_slices_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="Give one of them"):
        FeatureSlicing(memory="8GB", slices=2)
    with pytest.raises(ConfigError, match="no amount of memory"):
        FeatureSlicing(memory="much")


def test_less_than_the_weights_is_refused_with_numbers() -> None:
    pipe = DiffEffPipeline(make("sd"))
    with pytest.raises(ConfigError, match=r"1,000 bytes.*weights.*alone take"):
        pipe.apply(Plan([FeatureSlicing(memory="1kB")]))
    assert torch.equal(run("sd", pipe, steps=2), run("sd", make("sd"), steps=2))


# --- live tensors -------------------------------------------------------------------------------------------------
def test_live_activations_count_what_is_born_inside_and_alive() -> None:
    weight = torch.randn(1000)
    with live_activations(record=True) as live:
        a = weight * 2
        b = a + 1
        del a
        view = b.view(10, 100)
        weight.add_(1)
        del b
        assert live.now == 4000
        del view
        assert live.now == 0
    assert live.peak == 8000
    assert live.at == "aten.add.Tensor"
    assert [held.bytes for held in live.held] == [4000, 4000]


# --- alone --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_give_the_same(family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=STEPS)
    pipe.apply(Plan([FeatureSlicing(slices=3, vae=False)]))
    assert close(run(family, pipe, steps=STEPS), plain)
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged
    assert "3 slices" in pipe.report.methods[0].reason
    assert close(run(family, pipe, steps=STEPS, guidance=False), run(family, make(family), steps=STEPS, guidance=False))
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain)


def peak(pipe: Any, family: str) -> int:
    with live_activations() as live:
        run(family, pipe, steps=1, size=(16, 16) if family == "sd" else (6, 16, 16))
    return live.peak


@pytest.mark.parametrize(("family", "ratio"), [("sd", 2.5), ("animatediff", 4.0)])
def test_the_peak_falls_and_a_budget_lowers_it(family: str, ratio: float) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = peak(pipe, family)
    assert plain / peak(pipe.apply(Plan([FeatureSlicing(slices=8)])), family) > ratio
    modules = [m for m in pipe.wrapped.components.values() if isinstance(m, torch.nn.Module)]
    weights = sum(p.nbytes for m in modules for p in (*m.parameters(), *m.buffers()))
    wide, tight = (peak(pipe.apply(Plan([FeatureSlicing(memory=str(weights + part))])), family) for part in (10**9, 10))
    assert tight < wide < plain


# --- with others --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["sd", "animatediff"])
@pytest.mark.parametrize(
    "other",
    [
        DeepCache(interval=2),
        FeatureCache(first=1, last=1),
        KVDownsample(min_tokens=4),
        Int8Weights(min_features=8, kernel="dequantise"),
    ],
    ids=lambda config: config.name,
)
def test_with_another_method(other: Any, family: str) -> None:
    alone = DiffEffPipeline(make(family), plan=Plan([other]))
    reference = run(family, alone, steps=6)
    pipe = DiffEffPipeline(make(family), plan=Plan([other, FeatureSlicing(slices=3)]))
    assert close(run(family, pipe, steps=6), reference, 1e-3)
    assert pipe.report is not None
    assert all(method.engaged for method in pipe.report.methods)
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=6), run(family, make(family), steps=6))


def test_module_caches_are_refused_with_a_way_out() -> None:
    with pytest.raises(PlanConflict, match="Instead, use a cache of blocks or steps"):
        DiffEffPipeline(make("sd"), plan=Plan([FORA(), FeatureSlicing()]))


def test_with_model_offload_hooks() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = make("animatediff")
    plain = run("animatediff", pipe, steps=2)
    accelerate.hooks.add_hook_to_module(pipe.unet, accelerate.hooks.AlignDevicesHook("cpu", offload=True))
    sliced = DiffEffPipeline(pipe, plan=Plan([FeatureSlicing(slices=2)]))
    assert close(run("animatediff", sliced, steps=2), plain)
    sliced.remove()
    assert torch.equal(run("animatediff", sliced, steps=2), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["compile", "apply"])
def test_compiled(first: str) -> None:
    graphs: list[int] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    pipe = DiffEffPipeline(make("animatediff"))
    plain = run("animatediff", pipe, steps=2)
    if first == "compile":
        pipe.wrapped.unet.compile(backend=count)
    pipe.apply(Plan([FeatureSlicing(slices=2)]))
    if first == "apply":
        pipe.wrapped.unet.compile(backend=count)
    assert close(run("animatediff", pipe, steps=2), plain)
    built = len(graphs)
    assert built <= 400
    run("animatediff", pipe, steps=2)
    assert len(graphs) == built
    pipe.remove()
    torch._dynamo.reset()
