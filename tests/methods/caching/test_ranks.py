"""Processes that share a denoiser call out decide alike, in two real processes; others exchange nothing."""

from __future__ import annotations

from typing import Any

import pytest
from rank_jobs import COUNTED, MEASURED, STEPS, both
from torch import nn
from two_ranks import on_two_ranks

from diffeff.methods.caching.ranks import ranks_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(both, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def scripted_runs(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rank["halves"] for rank in ranks]


@pytest.fixture
def shared_runs(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rank["shared"] for rank in ranks]


def test_ranks_that_would_decide_apart_decide_alike_together(scripted_runs: list[dict[str, Any]]) -> None:
    first, second = scripted_runs
    assert first["threshold alone"][0] != second["threshold alone"][0]
    together = first["threshold together"][0]
    assert together == second["threshold together"][0]
    assert together == first["threshold alone"][0]  # the rank whose data changes most has its way
    assert len(together["cond"]) < STEPS


def test_one_number_a_step_is_exchanged_and_none_where_steps_are_counted(scripted_runs: list[dict[str, Any]]) -> None:
    for rank in scripted_runs:
        assert rank["threshold together"][1] == STEPS - 1  # the first step asks nobody
        assert rank["threshold alone"][1] == 0
        assert rank["interval together"][1] == 0
        assert rank["interval together"] == rank["interval alone"]


@pytest.mark.parametrize("name", [*MEASURED, *COUNTED])
def test_context_parallelism_computes_what_one_process_does(name: str, shared_runs: list[dict[str, Any]]) -> None:
    (skipped, alone, alike, exchanged), other = (rank[name] for rank in shared_runs)
    assert skipped == other[0]
    assert skipped
    if name not in ("dicache", "elastic_cache"):  # these weigh tokens, which each rank sees others of
        assert skipped == alone
        assert alike
    assert (exchanged > 0) is (name in MEASURED)


def test_a_plan_comes_off_from_under_the_split(shared_runs: list[dict[str, Any]]) -> None:
    assert all(rank["restored"] for rank in shared_runs)


def test_a_denoiser_that_is_not_shared_out_has_no_ranks() -> None:
    assert ranks_of(nn.Identity()) is None
