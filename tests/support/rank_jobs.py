"""What each of two processes does in the tests of caches under context parallelism: run by `two_ranks`."""

from __future__ import annotations

from typing import Any

import torch
from scripted import drive
from tiny import make, run
from torch import Tensor
from two_ranks import counting, marked

from diffeff.core.config import Config
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.caching.published.adacache import AdaCache
from diffeff.methods.caching.published.dicache import DiCache
from diffeff.methods.caching.published.easycache import EasyCache
from diffeff.methods.caching.published.elastic import ElasticCache
from diffeff.methods.caching.published.first_block_cache import FirstBlockCache
from diffeff.methods.caching.published.fora import FORA
from diffeff.methods.caching.published.taylorseer import TaylorSeer
from diffeff.methods.caching.published.teacache import TeaCache
from diffeff.pipeline import DiffEffPipeline

__all__ = ["COUNTED", "MEASURED", "STEPS", "both"]

STEPS = 10
THRESHOLD = FeatureCache(policy="threshold", threshold=0.3, first=1, last=1, predictor="hold")
INTERVAL = FeatureCache(interval=2, first=1, last=1)
MEASURED: dict[str, Config] = {
    "first_block_cache": FirstBlockCache(first=1, threshold=0.1, max_skips=2),
    "teacache": TeaCache(coefficients=(1.0, 0.0), threshold=0.5, max_skips=2),
    "easycache": EasyCache(threshold=0.5, max_skips=2),
    "dicache": DiCache(threshold=2.0, max_skips=2),
    "elastic_cache": ElasticCache(threshold=2.0, first=1, segments=3, anchors=16),
    "adacache": AdaCache(),
}
COUNTED: dict[str, Config] = {
    "fora": FORA(interval=2),
    "taylorseer": TaylorSeer(interval=3, first=2),
    "segment": FeatureCache(interval=2, site="segment", first=1, last=1),
}


def both(rank: int) -> dict[str, Any]:
    """All of it: processes are slow to start."""
    return {"halves": halves(rank), "shared": shared_tokens(rank)}


def halves(rank: int) -> dict[str, Any]:
    """Scripted runs in which the data of rank 0 moves four times as fast as that of rank 1."""
    speed = (4.0, 1.0)[rank]
    latents = lambda i: torch.full((1, 2, 3), 1.0 + 0.05 * speed * i)  # noqa: E731
    found: dict[str, Any] = {}
    for name, config in {"threshold": THRESHOLD, "interval": INTERVAL}.items():
        for parallel in (False, True):
            with marked(parallel), counting() as sizes:
                seen = drive([config], _model, steps=STEPS, latents=latents)
            found[f"{name} {'together' if parallel else 'alone'}"] = [seen.computed, len(sizes)]
    return found


def _model(x: Tensor, branch: str, index: int) -> Tensor:
    return 2 * x + (branch == "cond")


def shared_tokens(rank: int) -> dict[str, Any]:
    """A tiny Wan under diffusers' context parallelism against the same plan in one process."""
    import diffusers

    pipe, found = make("wan"), {}
    expected = {name: _run(DiffEffPipeline(make("wan"), plan=[c])) for name, c in {**MEASURED, **COUNTED}.items()}
    pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    before = {name: _forward(pipe, name) for name in ("", "blocks.0", "blocks.1")}
    for name, config in {**MEASURED, **COUNTED}.items():
        wrapped = DiffEffPipeline(pipe, plan=[config])
        with counting() as sizes:
            output, skipped = _run(wrapped)
        wrapped.remove()
        alike = torch.allclose(output, expected[name][0], atol=1e-5)
        found[name] = [skipped, expected[name][1], alike, len(sizes)]
    found["restored"] = all(_forward(pipe, name) == forward for name, forward in before.items())
    return found


def _forward(pipe: Any, name: str) -> Any:
    """What a call of a module goes through."""
    module = pipe.transformer.get_submodule(name)
    registry = getattr(module, "_diffusers_hook", None)
    return [module.forward, *([] if registry is None else [place.forward for place in registry._fn_refs])]


def _run(pipe: DiffEffPipeline) -> tuple[Tensor, Any]:
    output = run("wan", pipe, steps=STEPS)
    assert pipe.report is not None
    details = pipe.report.methods[0].details
    names = [name for name in details if name.startswith("transformer")]
    return output, details["skipped_steps"] if not names else [details[name]["skipped_steps"] for name in names]
