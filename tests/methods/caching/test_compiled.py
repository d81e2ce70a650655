"""torch.compile under caches of modules and of a UNet's deep part: few graphs, none later, right results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny import make, run

from diffeff.core.config import Config
from diffeff.methods.caching.published.deepcache import DeepCache
from diffeff.methods.caching.published.fora import FORA
from diffeff.methods.caching.published.pab import PAB
from diffeff.pipeline import DiffEffPipeline

STEPS = 9
CASES: list[tuple[str, Config, str]] = [
    ("wan", PAB(low=0, high=1000), "blocks before"),
    ("wan", PAB(low=0, high=1000), "whole after"),
    ("wan", FORA(interval=2), "blocks after"),
    ("wan", FORA(interval=2), "whole before"),
    ("sd", DeepCache(interval=2), "blocks after"),
]


class Graphs:
    """A backend that keeps what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.made.append(graph)
        run_graph: Callable[..., Any] = graph.forward
        return run_graph

    def traced(self) -> set[str]:
        """Lines of code the graphs came from."""
        nodes = (node for graph in self.made for node in graph.graph.nodes)
        return {line for node in nodes for line in (node.stack_trace or "").splitlines()}


def compiled(pipe: DiffEffPipeline, config: Config, how: str) -> Graphs:
    """The pipe with the cache, compiled before or after, block by block or whole."""
    torch._dynamo.reset()
    graphs = Graphs()
    denoiser = pipe.denoisers[0]
    modules = [b.module for b in denoiser.blocks] if how.startswith("blocks") else [denoiser.module]
    if how.endswith("after"):
        pipe.apply([config])
    for module in modules:
        module.compile(backend=graphs)
    if how.endswith("before"):
        pipe.apply([config])
    return graphs


@pytest.mark.parametrize(("family", "config", "how"), CASES, ids=lambda value: getattr(value, "name", value))
def test_it_computes_the_same_and_compiles_nothing_in_a_second_run(family: str, config: Config, how: str) -> None:
    expected = run(family, DiffEffPipeline(make(family), plan=[config]), steps=STEPS)
    pipe = DiffEffPipeline(make(family))
    graphs = compiled(pipe, config, how)
    assert torch.allclose(run(family, pipe, steps=STEPS), expected, atol=1e-5)
    made = len(graphs.made)
    assert made
    assert torch.allclose(run(family, pipe, steps=STEPS), expected, atol=1e-5)
    assert len(graphs.made) == made
    assert not [line for line in graphs.traced() if "/diffeff/" in line]  # what caches do is nobody's graph


def test_deeper_models_need_no_more_graphs() -> None:
    """A guard per block would reach torch's limit of recompilations, and the rest would run uncompiled in silence."""
    counts = []
    for layers in (4, 12):
        pipe = DiffEffPipeline(make("wan"))
        pipe.wrapped.transformer = _deeper(pipe.wrapped.transformer, layers)
        pipe = DiffEffPipeline(pipe.wrapped)
        graphs = compiled(pipe, FORA(interval=2), "blocks before")
        run("wan", pipe, steps=STEPS)
        counts.append(len(graphs.made))
    assert counts[0] == counts[1] <= 8


def _deeper(transformer: Any, layers: int) -> Any:
    config = {**transformer.config, "num_layers": layers}
    return diffusers.WanTransformer3DModel.from_config(config).eval()
