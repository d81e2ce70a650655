"""Caches that have nothing to skip: they change no bit, and say so."""

from __future__ import annotations

import pytest
import torch
from tiny import make, run

from diffeff.eval.overhead import idle_plans
from diffeff.pipeline import DiffEffPipeline

PLANS = idle_plans()
STEPS = 8


@pytest.mark.parametrize("name", PLANS)
def test_a_cache_with_nothing_to_skip_is_exact_and_says_so(name: str) -> None:
    for family in ("wan", "sd"):
        pipe = DiffEffPipeline(make(family))
        if all(row.applies for row in PLANS[name].check(pipe.denoisers)):
            break
    else:
        pytest.fail(f"{name} acts on neither: give it idle options in diffeff.eval.overhead")
    plain = run(family, pipe, steps=STEPS)
    pipe.apply(PLANS[name])
    assert torch.equal(run(family, pipe, steps=STEPS), plain)
    assert pipe.report is not None
    (outcome,) = pipe.report.methods
    assert not outcome.engaged
    assert "nothing was skipped" in outcome.reason
    assert f"{name} did nothing: {outcome.reason}" in pipe.report.warnings
    assert all(share.computed == share.total for share in pipe.report.steps.values())
