"""The tuner on a bundled model with few steps: targets met, told, refused, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.eval.render.tune_plot import tune_plot
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.search.points import Candidate, Point, Target, Tuned, front
from diffeff.search.work import WorkFile
from diffeff.zoo.world import HELD_OUT

PROMPTS = [scene.caption for scene in HELD_OUT[:2]]
CALL = {"num_inference_steps": 10, "guidance_scale": 2.0, "height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def pipe() -> DiffEffPipeline:
    made = DiffEffPipeline.from_pretrained("sprites-wan")
    made.set_progress_bar_config(disable=True)
    return made


def point(label: str, psnr: float, speedup: float) -> Point:
    return Point(Candidate("steps", label, Plan(), 5), psnr, 1 / speedup, speedup)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [point("a", 30, 2.0), point("b", 29, 2.0), point("c", 40, 1.5), point("d", 35, 1.4), point("e", 20, 3.0)]
    assert [p.candidate.label for p in front(points)] == ["c", "a", "e"]


def test_targets_are_checked() -> None:
    for wrong in ({}, {"min_psnr": 30, "min_speedup": 2}):
        with pytest.raises(ConfigError, match="exactly one"):
            Target(**wrong)
    with pytest.raises(ConfigError, match="5 to 100"):
        Target(min_psnr=3)
    with pytest.raises(ConfigError, match="1 to 100"):
        Target(min_speedup=0.5)


def test_the_work_file_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    WorkFile(path, {"model": "a"}).put([1, 2], "try", "x")
    with path.open("a") as file:
        file.write('{"key": "cut of')
    again = WorkFile(path, {"model": "a"})
    assert again.get("try", "x") == [1, 2]
    assert again.get("try", "y") is None
    again.put(3, "try", "y")
    assert WorkFile(path, {"model": "a"}).get("try", "y") == 3
    assert WorkFile(path, {"model": "b"}).get("try", "x") is None


def test_few_step_models_are_refused_with_what_helps(pipe: DiffEffPipeline) -> None:
    with pytest.raises(MethodInapplicable, match="int8_weights"):
        pipe.tune(PROMPTS, min_psnr=30, call={"num_inference_steps": 8})


def test_bad_settings_are_refused(pipe: DiffEffPipeline) -> None:
    with pytest.raises(ConfigError, match="at least one prompt"):
        pipe.tune([], min_psnr=30)
    with pytest.raises(ConfigError, match="1 seeds for 2 prompts"):
        pipe.tune(PROMPTS, min_psnr=30, seeds=[0])
    with pytest.raises(ConfigError, match="allowed: exact"):
        pipe.tune(PROMPTS, min_psnr=30, families=["magic"])


def test_fewer_steps_alone_and_going_on(pipe: DiffEffPipeline, tmp_path: Path) -> None:
    """With nothing else to choose from it says so; the second call finds everything in the work file."""
    work, heard = tmp_path / "work.jsonl", []
    options: dict[str, Any] = {"call": CALL, "families": ["steps"], "work": work}
    first = pipe.tune(PROMPTS, min_psnr=20, observe=lambda done, what: heard.append(done), **options)
    assert first.met
    assert first.steps < 10
    assert "fewer steps alone are best" in first.message
    assert not first.plan.methods
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    before = work.read_text()
    again = pipe.tune(PROMPTS, min_psnr=20, **options)
    assert work.read_text() == before
    assert again.to_dict() == first.to_dict()
    assert json.loads(json.dumps(first.to_dict()))["met"]
    assert not pipe.plan.methods


def test_what_can_be_reached_is_said(pipe: DiffEffPipeline) -> None:
    found = pipe.tune(PROMPTS, min_psnr=99, call=CALL, families=["steps"])
    assert not found.met
    assert "cannot be reached. What can:" in found.message
    assert found.steps == 10


@pytest.mark.slow
def test_schedules_and_solvers_meet_a_target(pipe: DiffEffPipeline, tmp_path: Path) -> None:
    found: Tuned = pipe.tune(PROMPTS, min_psnr=25, call=CALL, rounds=2, swaps=2, work=tmp_path / "w.jsonl")
    assert found.met
    assert found.chosen is not None
    assert found.chosen.measured is not None
    assert found.chosen.measured.psnr >= 25
    kinds = {p.candidate.kind for p in found.points}
    assert {"plain", "steps", "schedule", "preset", "guidance"} <= kinds
    schedules = [p for p in found.points if "corrected" in p.candidate.label]
    assert schedules
    pipe.apply(found.plan)
    assert pipe(PROMPTS[0], **{**CALL, "num_inference_steps": found.steps}, output_type="np").frames.shape[1] == 5
    pipe.remove()
    assert found.plan.model is not None
    figure = tune_plot(found.to_dict(), "sprites-wan")
    assert figure.axes[0].get_xlabel() == "speed-up over plain"
