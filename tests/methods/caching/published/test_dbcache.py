"""DBCache: head and tail always run, masks stretch, quotas end it."""

from __future__ import annotations

import pytest
from patterns import our_run

from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.policy import Action, Mask, Quota, Situation
from diffeff.methods.caching.published.dbcache import DBCache
from diffeff.methods.caching.published.first_block_cache import FirstBlockCache

OPEN = {"threshold": 9.0, "first": 1, "last": 0, "max_skips": None}


def test_one_head_block_and_no_tail_is_first_block_cache() -> None:
    options = {"threshold": 0.1, "first": 1, "last": 0, "max_skips": None}
    ours, found = our_run("wan", DBCache(head=1, **options), 12)  # type: ignore[arg-type]
    theirs, expected = our_run("wan", FirstBlockCache(**options), 12)  # type: ignore[arg-type]
    assert ours == theirs
    assert found.equal(expected)


def test_quota_and_mask() -> None:
    assert our_run("wan", DBCache(head=1, quota=3, **OPEN), 10)[0] == [1, 2, 3]  # type: ignore[arg-type]
    skipped, _ = our_run("wan", DBCache(head=1, tail=1, mask="ultra", **OPEN), 28)  # type: ignore[arg-type]
    assert len(skipped) == 20  # 8 of 28 computed
    assert Quota(2).decide(Situation(5, 5, 1, computed=3)) is Action.COMPUTE
    halves = Mask((1, 1), (1, 1))
    assert [halves.decide(Situation(i, 7 - i, 1)) is Action.PREDICT for i in range(8)] == [
        False, False, True, True, False, False, True, False,
    ]  # fmt: skip


def test_edges_that_take_all_blocks_are_refused() -> None:
    with pytest.raises(MethodInapplicable, match="no block of"):
        our_run("wan", DBCache(), 12)
