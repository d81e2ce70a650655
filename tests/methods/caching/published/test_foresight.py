"""Foresight: blocks measure themselves in the warm-up, and rest while they change less."""

from __future__ import annotations

import pytest
import torch
from tiny import make, run

from diffeff.core.run import Clock
from diffeff.errors import MethodInapplicable
from diffeff.methods import Foresight
from diffeff.methods.caching.policy import Action, Situation
from diffeff.methods.caching.published.foresight import _EachBlock, _OwnChange
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan


def test_the_unit_is_the_tail_of_the_warm_up_and_changes_are_counted_in_it() -> None:
    own = _OwnChange(warmup=3)
    outputs = [torch.full((1, 2, 2), x) for x in (0.0, 1.0, 3.0, 3.5)]
    assert own.change(outputs[0]) is None
    for x in outputs[:3]:
        own.computed(x, x)
    assert own.unit == pytest.approx(4 + 0.1 * 1)
    assert own.change(outputs[0]) == pytest.approx(4 / 4.1)
    own.computed(outputs[3], outputs[3])
    assert own.unit == pytest.approx(4.1), "the warm-up is over"
    assert own.change(outputs[0]) == pytest.approx(0.25 / 4.1)


def test_a_block_that_does_not_change_at_all_has_no_unit() -> None:
    own = _OwnChange(warmup=2)
    for _ in range(2):
        own.computed(torch.ones(1), torch.ones(1))
    assert own.change(torch.ones(1)) == float("inf")


def test_every_n_th_step_behind_the_warm_up_is_computed_and_others_by_their_change() -> None:
    pipe = DiffEffPipeline(make("wan"))
    denoiser = pipe.denoisers[0]
    site = _EachBlock(2, 0.15, 0.5)
    assert [len(s.blocks) for s in site.ranges(denoiser)] == [1] * len(denoiser.blocks)
    rule = site.rule(site.ranges(denoiser)[0], denoiser, Clock(0, 20))
    assert rule is not None

    def decided(change: float | None) -> list[int]:
        found = [Situation(i, 19 - i, 1, change, i) for i in range(3, 20)]
        return [at.index for at in found if rule.decide(at) is Action.COMPUTE]

    assert decided(0.4) == [4, 6, 8, 10, 12, 14, 16, 18]
    assert decided(0.5) == decided(None) == list(range(3, 20))


def test_blocks_decide_apart_and_a_threshold_of_zero_is_exact() -> None:
    plain = run("wan", make("wan"), steps=8)
    pipe = DiffEffPipeline(make("wan"), Plan([Foresight(threshold=0.0)]))
    assert torch.equal(run("wan", pipe, steps=8), plain)
    pipe.apply(Plan([Foresight(threshold=100.0)]))
    assert not torch.equal(run("wan", pipe, steps=8), plain)
    rows = [row for row in pipe.report.methods[0].details.values() if isinstance(row, dict) and "skipped_steps" in row]
    assert len(rows) == len(pipe.denoisers[0].blocks)
    assert all(row["skipped_steps"] == [3, 5] for row in rows), "the last step is protected"


def test_unets_are_refused() -> None:
    with pytest.raises(MethodInapplicable, match="UNet"):
        DiffEffPipeline(make("sd")).apply(Plan([Foresight()]))
