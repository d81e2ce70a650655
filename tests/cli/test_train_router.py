"""`diffeff train-router`: trains, measures, writes a plan that plays; says what cannot be before any work."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from diffeff.cli import app
from diffeff.methods.caching.published.harmonica import HarmoniCa
from diffeff.plan import Plan

SMALL = ("--steps", "9", "--size", "32x32", "--frames", "5", "--limit", "2", "--trajectories", "1", "--compute", "0.5")


def cli(*words: str) -> Result:
    return CliRunner().invoke(app, ["train-router", *words])


def test_a_router_is_trained_measured_and_saved(tmp_path: Path) -> None:
    plan, work = tmp_path / "plan.json", tmp_path / "state.safetensors"
    options = ("sprites-wan", *SMALL, "-o", str(plan), "--work", str(work))
    done = cli(*options, "--measure", "1", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["plan"] == str(plan)
    assert 0.45 < told["share"] <= 0.5
    assert told["finished"]
    assert told["measured"]["psnr"] > 10
    saved = Plan.load(plan)
    (config,) = saved.methods
    assert isinstance(config, HarmoniCa)
    assert len(config.router) == 9
    assert saved.model is not None
    assert (saved.model.family, saved.model.steps) == ("wan", 9)
    assert work.exists()
    again = cli(*options, "--measure", "0")
    assert again.exit_code == 0, again.output
    assert f"{told['speedup']:.2f}x less in all" in again.stdout
    assert Plan.load(plan) == saved


def test_bad_requests_are_refused_before_any_work(tmp_path: Path) -> None:
    both = cli("sprites-wan", "--compute", "0.5", "--speedup", "2")
    assert both.exit_code == 3
    assert "exclude each other" in both.output
    folder = cli("sprites-wan", "-o", str(tmp_path))
    assert folder.exit_code == 4
    assert "is a folder" in folder.output


def test_a_target_that_no_router_meets_is_refused_with_the_limit(tmp_path: Path) -> None:
    small = SMALL[: SMALL.index("--compute")]
    asked = cli("sprites-wan", *small, "--speedup", "50", "-o", str(tmp_path / "plan.json"))
    assert asked.exit_code == 3
    assert "speed-ups below" in asked.output
    assert not (tmp_path / "plan.json").exists()


def test_the_help_teaches() -> None:
    shown = cli("--help")
    assert shown.exit_code == 0
    for word in ("Examples", "--speedup", "--minutes", "fewer steps", "HarmoniCa"):
        assert word in shown.stdout
