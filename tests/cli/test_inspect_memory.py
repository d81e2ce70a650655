"""`diffeff inspect --memory`: a table, JSON, and refusals with numbers."""

from __future__ import annotations

import json

from typer.testing import CliRunner, Result

from diffeff.cli import app

SMALL = ("--height", "32", "--width", "32", "--frames", "5")


def cli(*words: str) -> Result:
    return CliRunner().invoke(app, ["inspect", "sprites-wan", *SMALL, *words])


def test_json_holds_stages_and_steps() -> None:
    result = cli("--budget", "100GB", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["call"]["num_frames"] == 5
    assert found["steps"][0]["step"] == "as asked"
    assert list(found["plain"]["stages"]) == ["text", "denoise", "decode"]
    assert found["plain"]["stages"]["denoise"]["weights"] == sum(found["plain"]["weights"].values())


def test_table_without_a_budget_shows_plain_and_sliced() -> None:
    result = cli("--memory")
    assert result.exit_code == 0, result.output
    assert "as asked on cpu: peak" in result.stdout
    assert "with feature slicing on cpu: peak" in result.stdout
    assert "decode" in result.stdout


def test_a_budget_that_cannot_be_met_is_refused_with_numbers() -> None:
    result = cli("--budget", "1MB")
    assert result.exit_code != 0
    assert "MemoryBudgetError" in repr(result.exception) or "does not fit 1.0 MB" in result.output
