"""What other caches get wrong where their hooks meet pipelines, shown on them, and its absence here.

Flaws of one method's mathematics are shown in that method's own test file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from tiny import call_kwargs, make, run
from torch import nn

from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.published.first_block_cache import FirstBlockCache
from diffeff.methods.caching.published.magcache import MagCache
from diffeff.methods.guidance.guidance_skip import GuidanceSkip
from diffeff.pipeline import DiffEffPipeline

FLAT = {"sigmas": (0.01, 1.0), "magnitudes": (1.0, 1.0)}
OURS = MagCache(threshold=9.0, max_skips=9, **FLAT)  # type: ignore[arg-type]


def theirs(calls: int) -> MagCacheConfig:
    """diffusers' MagCache with a residual that never changes its size."""
    return MagCacheConfig(threshold=9.0, max_skip_steps=9, num_inference_steps=calls, mag_ratios=[1.0] * calls)


def computed(transformer: Any, go: Any) -> list[bool]:
    """Whether the second block was computed, call by call."""
    calls: list[bool] = []
    transformer.register_forward_pre_hook(lambda *_: calls.append(False))
    transformer.blocks[1].attn1.to_q.register_forward_hook(lambda *_: calls.__setitem__(-1, True))
    go()
    return calls


# --- pipelines that say nothing of their branches (102 of diffusers' 150) -------------------------------------------
def test_first_block_cache_stops_where_a_pipeline_sets_no_context_and_ours_runs() -> None:
    bare = make("wan-v2v")
    bare.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(ValueError, match="No cache context is set"):
        run("wan-v2v", bare, steps=8)
    pipe = DiffEffPipeline(make("wan-v2v"), [FirstBlockCache(threshold=5.0, first=1)])
    run("wan-v2v", pipe, steps=8)
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged


def test_magcache_takes_two_branches_for_one_and_ours_keeps_them_apart() -> None:
    """Cond and uncond calls count as steps of one history: cond is given the residual of uncond."""
    options = {"threshold": 9.0, "max_skip_steps": 1, "retention_ratio": 0.1}
    bare = make("wan-v2v")
    bare.transformer.enable_cache(MagCacheConfig(**options, num_inference_steps=24, mag_ratios=[1.0] * 24))
    calls = computed(bare.transformer, lambda: run("wan-v2v", bare, steps=12))
    cond, uncond = calls[0::2], calls[1::2]
    assert not any(cond[1:])
    assert all(uncond)
    model = make("wan-v2v")
    pipe = DiffEffPipeline(model, [MagCache(threshold=9.0, max_skips=1, warmup=0.1, **FLAT)])  # type: ignore[arg-type]
    calls = computed(model.transformer, lambda: run("wan-v2v", pipe, steps=12))
    assert calls[0::2] == calls[1::2]
    assert 0 < sum(calls[0::2]) < len(calls[0::2])


# --- state and composition ------------------------------------------------------------------------------------------
def test_after_an_interrupt_at_another_size_magcache_returns_its_input_and_ours_the_result() -> None:
    """Its residual does not fit the new size: instead of computing, it passes the input on without any residual."""

    def stop(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            raise InterruptedError
        return kwargs

    def difference(pipe: Any, fresh: Any) -> float:
        with pytest.raises(InterruptedError):
            pipe(**call_kwargs("wan", pipe, steps=8, guidance=False), callback_on_step_end=stop)
        small = {"steps": 8, "guidance": False, "size": (8, 8)}
        return float((run("wan", pipe, **small) - run("wan", fresh, **small)).norm())

    bare, clean = make("wan"), make("wan")
    for pipe in (bare, clean):
        pipe.transformer.enable_cache(theirs(8))
    assert difference(bare, clean) > 0.1
    assert difference(DiffEffPipeline(make("wan"), [OURS]), DiffEffPipeline(make("wan"), [OURS])) == 0.0


def test_diffusers_takes_one_technique_and_plans_take_what_does_not_conflict() -> None:
    bare = make("wan")
    bare.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(ValueError, match="already been enabled"):
        bare.transformer.enable_cache(theirs(8))
    both = [GuidanceSkip(first=1), FirstBlockCache(threshold=5.0, first=1)]
    pipe = DiffEffPipeline(make("wan"), both)
    run("wan", pipe, steps=9)
    assert pipe.report is not None
    assert all(outcome.engaged for outcome in pipe.report.methods)


def test_a_transformer_of_one_block_fails_within_their_hook_and_is_refused_here() -> None:
    model = make("wan")
    model.transformer.blocks = nn.ModuleList([model.transformer.blocks[0]])
    with pytest.raises(MethodInapplicable, match="no block of"):
        DiffEffPipeline(model, [FirstBlockCache()])
    with pytest.raises(IndexError, match="pop from empty list"):
        model.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))


@pytest.mark.parametrize("family", ["sd3", "pixart", "dit"])
def test_models_without_their_mixin_are_served(family: str) -> None:
    assert not hasattr(make(family).transformer, "enable_cache")
    pipe = DiffEffPipeline(make(family), [FirstBlockCache(threshold=5.0, first=1)])
    assert torch.isfinite(run(family, pipe, steps=8)).all()
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged


# --- cache-dit ------------------------------------------------------------------------------------------------------
@contextmanager
def dbcache(pipe: Any) -> Iterator[Any]:
    """cache-dit's DBCache on a pipeline, and off again."""
    package = pytest.importorskip("cache_dit", reason="the package cache-dit is compared with (pip extra: peers)")
    package.enable_cache(pipe)
    try:
        yield package
    finally:
        package.disable_cache(pipe)


def test_cache_dit_patches_the_class_of_the_pipeline_and_ours_only_the_instance() -> None:
    model: Any = make("wan")
    kind = type(model)
    before, block = kind.__call__, type(model.transformer.blocks[0]).forward
    with dbcache(model):
        assert kind.__call__ is not before
    assert kind.__call__ is before
    pipe = DiffEffPipeline(make("wan"), [FirstBlockCache()])
    assert kind.__call__ is before
    assert type(pipe.wrapped.transformer.blocks[0]).forward is block
