"""The exhaustive comparison of the schedule search, and what a schedule keeps elsewhere, on runs of a few steps."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from diffeff.eval.oracle import compare
from diffeff.eval.transfer import Setting, measure, tuned
from diffeff.methods.caching.scheduled import FITTED
from diffeff.methods.tokens.unpad_text import UnpadText
from diffeff.pipeline import DiffEffPipeline
from diffeff.search.closed_loop import EndError
from diffeff.search.schedules import ScheduleSearch
from diffeff.search.sensitivity import sensitivities
from diffeff.search.trace import Job, record

CALL = {"num_inference_steps": 6, "guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5}
PROMPTS = ("a red circle moving left, camera static", "a blue square moving up, camera static")


@pytest.fixture(scope="module")
def pipe() -> DiffEffPipeline:
    made = DiffEffPipeline.from_pretrained("sprites-wan")
    made.set_progress_bar_config(disable=True)
    return made


def test_the_oracle_is_the_best_of_all_schedules(pipe: Any) -> None:
    job = Job(PROMPTS[:1], (3,), CALL, (UnpadText(),))
    (row,) = compare(pipe, job, [3])
    assert row["schedules"] == 10
    trace = record(pipe, job)
    search = ScheduleSearch.of(trace, sensitivities(pipe, job, trace, 4))
    assert trace.final is not None
    errors = {}
    for rest in combinations(range(1, 6), 2):
        errors[0, *rest] = EndError(pipe, job, trace.final)(search.assemble((0, *rest), names=(FITTED,)))
    best = min(errors, key=lambda steps: errors[steps])
    assert tuple(row["oracle"]["steps"]) == best
    assert row["oracle"]["error"] == pytest.approx(errors[best], rel=1e-4)
    assert row["gap"] >= -1e-4
    assert row["search"]["error"] == pytest.approx(errors[tuple(row["search"]["steps"])], rel=1e-4)


def test_a_schedule_is_measured_on_other_prompts_and_steps(pipe: Any) -> None:
    here = Setting(PROMPTS, (3, 4), CALL | {"num_inference_steps": 8}, (UnpadText(),), 4)
    schedule = tuned(pipe, here)
    assert len(schedule.computed) == 4
    own = measure(pipe, here, schedule, PROMPTS, 3)
    there = measure(pipe, here.at(12), schedule, PROMPTS, 3)
    assert len(own) == len(there) == 2
    assert 15 < min(own) <= max(own) < 80
    assert min(there) > 10
