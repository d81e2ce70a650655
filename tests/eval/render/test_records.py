"""Rows become cells: the newest run, states, what was not measured; broken files are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from bench_rows import bench_rows

from diffeff.errors import ArtefactError, ConfigError
from diffeff.eval.render.records import cells, latest, models, newest, read_rows


def test_the_newest_run_of_a_model_counts() -> None:
    old, new, other = bench_rows(run="a"), bench_rows(run="b"), bench_rows("sprites-sd", run="a")
    rows = [*old, *new, *other, {"benchmark": "overhead", "model": "sprites-wan"}]
    assert latest(rows, "sprites-wan") == new
    assert latest(rows, "sprites-sd") == other
    assert latest(rows, "digits-dit") == []
    assert models(rows) == ["sprites-wan", "sprites-sd"]


def test_cells_know_what_they_are() -> None:
    found = {cell.label: cell for cell in cells(bench_rows())}
    assert next(iter(found.values())).is_plain
    assert [found[name].state for name in ("balanced", "diffusers TaylorSeer", "downsample.json", "tomesd")] == [
        "ok",
        "idle",
        "refused",
        "failed",
    ]
    assert found["balanced"].package == "diffeff"
    assert found["cache-dit DBCache, threshold 0.1"].package == "cache-dit"
    assert found["cache-dit DBCache, threshold 0.1"].group == "cache-dit DBCache"
    assert found["fewer steps, 12 steps"].group == "fewer steps"
    assert found["fewer steps, UniPC order 2, 12 steps"].group == "fewer steps, UniPC order 2"
    assert found["tomesd"].message.startswith("AttributeError: 'WanPipeline' object")
    assert found["tomesd"].phase == "apply"
    assert not found["tomesd"].rated
    assert found["tomesd"].speed is None
    assert not found["diffusers TaylorSeer"].rated
    assert list(found["balanced"].adherence) == ["all", "colour", "shape", "motion"]


def test_plain_comes_first_wherever_it_stands() -> None:
    rows = bench_rows()
    assert cells(rows[::-1])[0].is_plain


def test_identical_everywhere_is_infinite_and_a_mean_without_interval_has_no_width() -> None:
    plain, high = bench_rows()[:2]
    assert cells([plain])[0].psnr is not None
    assert math.isinf(cells([plain])[0].psnr.value)  # type: ignore[union-attr]
    high["fidelity"]["psnr"] = {"mean": 40.0, "min": 40.0}
    found = cells([high])[0].psnr
    assert found is not None
    assert (found.value, found.low, found.high) == (40.0, 40.0, 40.0)
    high["fidelity"] = None
    assert cells([high])[0].psnr is None


def test_a_row_of_little_is_read_too() -> None:
    row = {"benchmark": "bench", "model": "m", "run": "r", "arm": {"kind": "peer", "name": "x:y"}, "status": "failed"}
    (cell,) = cells([row])
    assert (cell.label, cell.package, cell.message) == ("x:y", "x", "no reason given")


def test_newest_keeps_the_last_of_each_kind() -> None:
    rows = [{"m": "a", "n": 1}, {"m": "b", "n": 2}, {"m": "a", "n": 3}]
    assert newest(rows, "m") == [{"m": "a", "n": 3}, {"m": "b", "n": 2}]


def test_files_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text("\n".join(map(json.dumps, bench_rows())) + "\n\n", "utf-8")
    assert read_rows(path) == bench_rows()
    path.write_text('{"benchmark": "bench"}\n{"benchm', "utf-8")
    with pytest.raises(ConfigError, match=r"bench\.jsonl, line 2: not JSON"):
        read_rows(path)
    path.write_text('{"a": 1}\n', "utf-8")
    with pytest.raises(ConfigError, match=r"line 1: not a result row"):
        read_rows(path)
    with pytest.raises(ArtefactError, match=r"cannot read the results .*gone\.jsonl"):
        read_rows(tmp_path / "gone.jsonl")
