"""Caches made from a profile run: Step Rehash, SmoothCache, and the profiles themselves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import make, run

from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.published.profilingdit import ProfilingDiT
from diffeff.methods.caching.published.smoothcache import ErrorTable, SmoothCache, longest_skips
from diffeff.methods.caching.published.step_rehash import StepRehash, most_similar
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.search.profiles import block_drift, block_drifts, error_table, similarity_profile
from diffeff.search.trace import Job


@dataclass(frozen=True)
class TinyJob(Job):
    """A job on a tiny pipeline, which takes embeddings instead of prompts."""

    def run(self, pipe: Any, **more: Any) -> torch.Tensor:
        return run(self.call["family"], pipe, steps=self.call["steps"], **more)


def job(family: str, steps: int = 10) -> TinyJob:
    return TinyJob(("a",), (0,), {"family": family, "steps": steps})


def clock(steps: int) -> Clock:
    return Clock(total=steps, sigmas=torch.linspace(1, 0, steps + 1))


# --- Step Rehash --------------------------------------------------------------------------------------------------
def test_the_most_similar_steps_are_chosen_and_never_too_many_in_a_row() -> None:
    times = tuple(torch.linspace(1, 0, 12)[:11].tolist())
    cosines = (0.9, 0.9, 0.95, 0.97, 0.99, 0.999, 0.999, 0.99, 0.97, 0.95)
    options = StepRehash(times=times, similarities=cosines, share=0.3, first=1, last=1)
    found = sorted(most_similar(options, clock(11)))
    assert len(found) == 3
    assert all(b - a > 1 for a, b in pairwise(found))
    assert {6, 7} & set(found)
    longer = sorted(most_similar(options, clock(22)))
    assert len(longer) == 7
    assert min(longer) >= 6


@pytest.mark.parametrize("family", ["animatediff", "svd", "sd", "wan", "flux-cfg"])
def test_a_profiled_run_rehashes_as_many_steps_as_asked(family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    config = similarity_profile(pipe, job(family), StepRehash(share=0.3, first=2))
    assert len(config.times) == 10
    assert all(-1 <= c <= 1.0001 for c in config.similarities)
    plain = run(family, pipe, steps=10)
    pipe.apply([config])
    found = run(family, pipe, steps=10)
    assert pipe.report is not None
    (row,) = (v for k, v in pipe.report.methods[0].details.items() if k != "decided")
    assert len(row["skipped_steps"]) == 3
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.15
    assert Plan.from_dict(pipe.plan.to_dict()) == pipe.plan


def test_the_cut_lies_behind_a_temporal_module() -> None:
    pipe = DiffEffPipeline(make("animatediff"))
    config = StepRehash(times=(1.0, 0.0), similarities=(0.9,))
    (method,) = Plan([config]).build()
    last = method.segments(pipe.denoisers[0])[0].blocks[-1]
    assert last.name == "up_blocks.2.motion_modules.0"


# --- SmoothCache --------------------------------------------------------------------------------------------------
def test_skips_are_the_longest_within_the_threshold() -> None:
    times = tuple(float(10 - i) for i in range(10))
    errors = tuple((0.1, 0.2, 0.3) if i < 6 else (0.02, 0.04, 0.06) for i in range(10))
    table = ErrorTable(times, errors)
    assert longest_skips(table, times, 0.15, 0, 3) == {0, 2, 4, 8, 9}
    assert longest_skips(table, times, 0.01, 0, 3) == set(range(10))
    assert longest_skips(table, times, 5.0, 0, 3) == {0, 4, 8, 9}


def test_a_table_holds_at_other_numbers_of_steps() -> None:
    times = tuple(1 - i / 10 for i in range(10))
    table = ErrorTable(times, ((0.1, 0.2, 0.3),) * 10)
    assert table.at(0.8, 0.75) == pytest.approx(0.05)
    assert table.at(0.8, 0.6) == pytest.approx(0.2)
    assert table.at(0.9, 0.3) == float("inf")


@pytest.mark.parametrize("family", ["dit", "wan", "sd"])
def test_kinds_follow_schedules_of_their_own(family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    config = error_table(pipe, job(family), SmoothCache(threshold=0.25))
    plain = run(family, pipe, steps=10)
    pipe.apply([config])
    found = run(family, pipe, steps=10)
    assert pipe.report is not None
    kinds = pipe.report.methods[0].details["skipped_by_kind"]
    assert any(kinds.values())
    assert all(0 not in steps and 9 not in steps for steps in kinds.values())
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.1
    run(family, pipe, steps=16)
    pipe.apply([SmoothCache(**{**vars(config), "threshold": 0.0})])
    assert torch.equal(run(family, pipe, steps=10), plain)


@pytest.mark.parametrize("options", [{"errors": (0.1,)}, {"kinds": ("none",)}])
def test_tables_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="smoothcache"):
        SmoothCache(**options)


# --- profiles -----------------------------------------------------------------------------------------------------
def test_the_steadiest_blocks_are_taken() -> None:
    pipe = DiffEffPipeline(make("wan"))
    drifts = block_drifts(pipe, job("wan"))
    assert sorted(drifts) == [0, 1, 2, 3]
    chosen = block_drift(pipe, job("wan"), ProfilingDiT(), share=0.5).blocks
    assert len(chosen) == 2
    assert max(drifts[i] for i in chosen) <= min(drifts[i] for i in drifts if i not in chosen)
    with pytest.raises(MethodInapplicable, match="UNet"):
        block_drifts(DiffEffPipeline(make("sd")), job("sd"))


@pytest.mark.parametrize(("config", "maker"), [(StepRehash(), "similarity_profile"), (SmoothCache(), "error_table")])
def test_without_a_profile_the_refusal_names_its_maker(config: Any, maker: str) -> None:
    with pytest.raises(MethodInapplicable, match=maker):
        DiffEffPipeline(make("wan"), [config])
