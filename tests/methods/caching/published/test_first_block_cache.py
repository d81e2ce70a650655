"""First-Block Cache: diffusers' decisions where these are right, and none of its unprotected steps and stale state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from patterns import diffusers_run, our_run
from tiny import call_kwargs, make, run

from diffeff.methods.caching.published.first_block_cache import FirstBlockCache
from diffeff.pipeline import DiffEffPipeline

BARE: dict[str, Any] = {"first": 1, "last": 0, "max_skips": None}


@pytest.mark.parametrize(("family", "threshold"), [("wan", 0.08), ("wan", 0.1), ("flux", 0.35), ("flux", 0.5)])
def test_decides_and_computes_as_diffusers_does(family: str, threshold: float) -> None:
    theirs, expected = diffusers_run(family, FirstBlockCacheConfig(threshold=threshold), 12)
    ours, found = our_run(family, FirstBlockCache(threshold=threshold, **BARE), 12)
    assert ours == theirs
    assert 0 < len(theirs) < 11
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_published_form_skips_without_end_and_ours_protects_the_run() -> None:
    theirs, _ = diffusers_run("wan", FirstBlockCacheConfig(threshold=5.0), 12)
    assert theirs == list(range(1, 12))
    ours, _ = our_run("wan", FirstBlockCache(threshold=5.0), 12)
    assert ours == [3, 4, 5, 6, 8, 9, 10]


def test_the_published_form_keeps_residuals_after_an_interrupted_run_and_ours_does_not() -> None:
    def stop(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            raise InterruptedError
        return kwargs

    def after_interrupt(pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = run("wan", pipe, steps=8)
        with pytest.raises(InterruptedError):
            pipe(**call_kwargs("wan", pipe, steps=8, seed=5), callback_on_step_end=stop)
        return fresh, run("wan", pipe, steps=8)

    theirs: Any = make("wan")
    theirs.transformer.enable_cache(FirstBlockCacheConfig(threshold=5.0))
    assert not torch.equal(*after_interrupt(theirs))
    assert torch.equal(*after_interrupt(DiffEffPipeline(make("wan"), [FirstBlockCache(threshold=5.0)])))


def test_branches_share_the_decision_and_keep_their_residuals() -> None:
    pipe = DiffEffPipeline(make("wan"), [FirstBlockCache(threshold=5.0, first=1, max_skips=2)])
    run("wan", pipe, steps=9)
    assert pipe.report is not None
    row = pipe.report.methods[0].details["transformer"]
    assert row["computed"]["cond"] == row["computed"]["uncond"] == 4
    assert row["skipped_steps"] == [1, 2, 4, 5, 7]


def test_a_threshold_of_nothing_is_exact() -> None:
    _, found = our_run("flux", FirstBlockCache(threshold=0.0), 6)
    assert torch.equal(found, run("flux", make("flux"), steps=6, guidance=False))
