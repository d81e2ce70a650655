"""Sliced transformers beside other methods, offloading hooks, attention backends and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from denoiser_calls import captured, forward, relative, sliced
from diffusers.hooks import HookRegistry, ModelHook
from tiny import SMALL, make, run
from torch import nn

from diffeff.methods.table import config_class
from diffeff.pipeline import DiffEffPipeline

SLICED = {"use": "feature_slicing", "slices": 3, "vae": False}
OTHERS: dict[str, dict[str, Any]] = {
    "segment": {"use": "feature_cache", "site": "segment", "first": 1, "last": 1},
    "teacache": {"use": "teacache"},
    "kv_downsample": {"use": "kv_downsample", "min_tokens": 0},
    "int8_weights": {"use": "int8_weights", "kernel": "dequantise", "min_features": 8},
}


def outcome(family: str, *entries: dict[str, Any]) -> torch.Tensor:
    configs = [config_class(e["use"]).from_dict({**SMALL.get(e["use"], {}), **e}) for e in entries]
    pipe = DiffEffPipeline(make(family), configs)
    out = run(family, pipe, steps=8)
    assert pipe.report is not None
    for method in pipe.report.methods:
        assert method.engaged, method.reason
    return out


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("family", ["wan", "flux-cfg", "cogvideox"])
def test_with_another_method_the_result_is_that_methods(family: str, other: str) -> None:
    alone = outcome(family, OTHERS[other])
    assert relative(outcome(family, OTHERS[other], SLICED), alone) < 1e-4


@pytest.mark.parametrize("family", ["wan", "ltx", "pixart", "cogvideox", "hunyuanvideo", "flux", "sd3"])
def test_watched_modules_are_called_once_on_whole_tensors(family: str) -> None:
    model, call = captured(family)
    plain, calls = forward(model, call), list[int]()
    parts = [m for name, m in model.named_modules() if name.split(".")[-1] in ("attn", "attn1", "attn2", "ff", "ffn")]
    hooks = [m.register_forward_hook(lambda m, args, out: calls.append(id(m))) for m in parts]
    forward(model, call)
    expected = list(calls)
    calls.clear()
    with sliced(model):
        watched = forward(model, call)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(expected)
    assert relative(watched, plain) < 1e-5


@pytest.mark.parametrize("family", ["wan", "ltx", "pixart", "cogvideox", "hunyuanvideo", "flux", "sd3"])
def test_a_whole_run(family: str) -> None:
    assert relative(outcome(family, SLICED), run(family, make(family), steps=8)) < 1e-4


def projections(model: Any, call: Any, block: Any) -> int:
    """How many times a block's query projection is called: once, or once for each slice."""
    calls: list[int] = []
    hook = block.attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    forward(model, call)
    hook.remove()
    return len(calls)


# --- hooks that bring weights -------------------------------------------------------------------------------------
class _Arrival(ModelHook):
    """What an offloading hook does: something before and after each call of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["hook", "slices"])
def test_hooks_of_diffusers_stay_around_the_block(first: str) -> None:
    model, call = captured("wan")
    plain, hook, block = forward(model, call), _Arrival(), model.blocks[1]
    registry = HookRegistry.check_if_exists_or_initialize(block)
    if first == "hook":
        registry.register_hook(hook, "arrival")
    with sliced(model):
        if first == "slices":
            registry.register_hook(hook, "arrival")
        assert projections(model, call, block) == 3
        assert relative(forward(model, call), plain) < 1e-5
        assert hook.calls == 2
    assert projections(model, call, block) == 1
    assert hook.calls == 3
    registry.remove_hook("arrival")
    for name in ("_diffusers_hook", "forward"):
        vars(block).pop(name, None)
    assert torch.equal(forward(model, call), plain)


@pytest.mark.parametrize("first", ["hook", "slices"])
def test_hooks_of_accelerate_stay_around_the_block(first: str) -> None:
    from accelerate.hooks import ModelHook as AccelerateHook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    class Arrival(AccelerateHook):  # type: ignore[misc]
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Arrival.calls += 1
            return args, kwargs

    model, call = captured("wan")
    plain, block = forward(model, call), model.blocks[1]
    if first == "hook":
        add_hook_to_module(block, Arrival())
    with sliced(model):
        if first == "slices":
            add_hook_to_module(block, Arrival())
        assert projections(model, call, block) == 3
        assert relative(forward(model, call), plain) < 1e-5
        assert Arrival.calls == 2
    assert projections(model, call, block) == 1
    assert Arrival.calls == 3
    remove_hook_from_module(block)
    vars(block).pop("forward", None)
    assert torch.equal(forward(model, call), plain)


# --- attention backends -------------------------------------------------------------------------------------------
def test_the_backend_set_on_the_model_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    model, call = captured("wan")
    asked: list[Any] = []
    dispatch = attention_dispatch.dispatch_attention_fn

    def note(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        asked.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", note)
    plain = forward(model, call)
    model.set_attention_backend("_native_math")
    try:
        with sliced(model):
            assert relative(forward(model, call), plain) < 1e-5
    finally:
        model.reset_attention_backend()
    assert {getattr(backend, "value", backend) for backend in asked} == {"_native_math"}
    assert len(asked) == 3 * 2 * len(model.blocks)


# --- torch.compile ------------------------------------------------------------------------------------------------
@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
def test_a_sliced_block_compiles_into_one_graph(family: str) -> None:
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, call = captured(family)
    plain = forward(model, call)
    with sliced(model):
        compiled = torch.compile(model, backend=counting, fullgraph=True)
        for _ in range(2):
            assert relative(forward(compiled, call), plain) < 1e-5
    assert len(graphs) == 1
