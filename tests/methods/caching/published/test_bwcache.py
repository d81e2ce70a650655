"""BWCache: bursts once the blocks have stopped drifting, and a guarded tail."""

from __future__ import annotations

import torch
from patterns import our_run

from diffeff.methods.caching.indicator import Drift
from diffeff.methods.caching.policy import Action, Burst, Codebook, Situation, TailGuard
from diffeff.methods.caching.published.bwcache import BWCache


def test_drift_is_the_mean_over_blocks_of_relative_changes_between_computed_steps() -> None:
    drift, x = Drift(), torch.zeros(1)
    assert drift.change(x) is None
    drift.computed(x, torch.tensor([[1.0, 1.0], [100.0, 100.0]]))
    assert drift.change(x) is None
    drift.computed(x, torch.tensor([[1.5, 1.5], [110.0, 110.0]]))
    assert drift.change(x) == drift.change(x)
    assert abs((drift.change(x) or 0.0) - 0.3) < 1e-6  # not 0.103, which a pooled mean would give


def test_bursts_end_and_the_tail_is_computed() -> None:
    skipped, _ = our_run("wan", BWCache(threshold=10.0, burst=0.1), 20)
    assert skipped == [2, 3, 5, 6, 8, 9]  # 18 steps were left at the first: the last 9 are computed, from 11 on
    assert our_run("wan", BWCache(threshold=10.0, burst=0.1, tail=0.0), 20)[0][-1] == 18


def test_nothing_is_skipped_while_the_blocks_drift() -> None:
    pattern, _ = our_run("wan", BWCache(threshold=1e-6), 8)
    assert pattern == []


def test_rules() -> None:
    assert Burst(0.1).decide(Situation(5, 14, 1)) is Action.PREDICT
    assert Burst(0.1).decide(Situation(5, 14, 3)) is Action.COMPUTE
    assert TailGuard(0.5).decide(Situation(5, 4, 1)) is Action.PREDICT
    assert TailGuard(0.5).decide(Situation(5, 4, 1, left_at_first=9)) is Action.COMPUTE
    assert TailGuard(0.5).decide(Situation(5, 5, 1, left_at_first=9)) is Action.PREDICT
    book = Codebook((0.1, 0.2), (4, 2))
    ask = [(0.05, 3), (0.05, 4), (0.15, 1), (0.15, 2), (0.25, 1), (None, 1)]
    computed = [book.decide(Situation(5, 5, since, change)) is Action.COMPUTE for change, since in ask]
    assert computed == [False, True, False, True, True, True]
