"""Markdown tables: every row has as many cells as the head, whatever a message holds."""

from __future__ import annotations

import json

import pytest
from bench_rows import bench_rows, matrix_rows, scaling_rows

from diffeff.eval.render.docs import RESULTS
from diffeff.eval.render.markup import Markup
from diffeff.eval.render.records import cells
from diffeff.eval.render.tables import (
    bench_table,
    failures_table,
    features_tables,
    markdown,
    matrix_notes,
    matrix_table,
    overhead_table,
    scaling_table,
)

CELLS = cells(bench_rows(samples=False))


def _cells(table: str) -> list[list[str]]:
    lines = [line.replace("\\|", "") for line in table.splitlines()]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize("table", [bench_table(CELLS), bench_table(CELLS, short=True), failures_table(CELLS),
                                   matrix_table(matrix_rows()), scaling_table(scaling_rows())])  # fmt: skip
def test_tables_are_rectangular(table: str) -> None:
    assert len({len(line) for line in _cells(table)}) == 1


def test_numbers_are_those_of_the_rows() -> None:
    table = bench_table(CELLS)
    line = next(line for line in table.splitlines() if line.startswith("| balanced |"))
    assert "2.27 (2.20 to 2.34)" in line
    assert "56.9 dB [56.3, 57.5], worst 48.9" in line
    assert "| 46 % |" in line
    assert "96 % [86, 99]: colour 100, shape 98, motion 96" in line
    assert "beats fewer steps (48.8 dB)" in line
    assert "| 1.00 (1.00 to 1.00) |" in table
    assert "does nothing here" in table
    assert "tomesd" not in table


def test_failures_keep_their_own_words_harmless() -> None:
    table = failures_table(CELLS)
    assert (
        "| tomesd | failed (apply) | AttributeError: 'WanPipeline' object has no attribute 'named_modules' \\|" in table
    )
    assert "<b>" not in table
    assert "| downsample.json | refused (check) |" in table
    assert failures_table([cell for cell in CELLS if not cell.hopeless]) == ""


def test_columns_that_nobody_measured_are_left_out() -> None:
    bare = [dict(row) | {"adherence": None, "peak_memory": None, "flops": None} for row in bench_rows(samples=False)]
    head = bench_table(cells(bare)).splitlines()[0]
    assert "caption" not in head
    assert "memory" not in head
    assert "FLOPs" not in head


def test_a_part_of_the_arms_is_judged_among_all_of_them() -> None:
    some = [cell for cell in CELLS if cell.label == "balanced"]
    assert "beats fewer steps" in bench_table(some, CELLS)
    assert "not comparable" in bench_table(some)


def test_markup_stays_and_other_text_is_escaped() -> None:
    assert markdown(["a"], [["<i>|\nb"], [Markup("<a id='x'></a>")]]).splitlines()[2:] == [
        "| &lt;i>\\| b |",
        "| <a id='x'></a> |",
    ]


def test_matrix_says_what_and_why() -> None:
    table = matrix_table(matrix_rows())
    assert "| `kv_downsample` | refused | no effect | works, 57 % left |" in table
    assert "**fails**" in table
    assert ("kv_downsample", "no effect: flux", "every attention is below min_tokens") in matrix_notes(matrix_rows())
    assert ("int8_weights", "fails: dit", "RuntimeError: expected Half") in matrix_notes(matrix_rows())


def test_one_reason_of_several_families_is_one_note() -> None:
    rows = [
        dict(row, status="refused", reason="too few tokens") for row in matrix_rows() if row["method"] == "int8_weights"
    ]
    assert matrix_notes(rows) == [("int8_weights", "refused: every family", "too few tokens")]


def test_scaling_shows_exponents_with_intervals_or_that_there_are_none() -> None:
    rows = scaling_rows()
    rows[0]["slope_memory"] = None
    table = scaling_table(rows)
    assert "| sprites-wan | tokens | 64, 256, 1024, 4096 | 1.30 [1.24, 1.37] | \u2013 |" in table


def test_overhead_of_the_recorded_rows() -> None:
    rows = [json.loads(line) for line in (RESULTS / "overhead.jsonl").read_text("utf-8").splitlines()]
    assert "sprites-wan" in overhead_table([row for row in rows if row["benchmark"] == "overhead"])


def test_features_make_one_table_per_check() -> None:
    curve = {"frechet": [0.1, 0.5, 1.0], "kernel": [0.0, 0.1, 0.2]}
    rises = {"frechet": True, "kernel": False}
    rows = [
        {"check": "degradation", "kind": "noise", "unit": "sd", "amounts": [0, 0.1, 0.2], "clips": curve,
         "frames": curve, "rises": {"clips": rises, "frames": rises}, "trained_on": True, "n": 200},
        {"check": "captions", "attribute": "colour", "score": [90, 80, 70], "falls": True, "separated": 0.99, "n": 200},
        {"check": "checkpoints", "model": "sprites-wan", "steps": [30, 60], "clips": curve, "frames": curve,
         "score": [1, 2], "in_order": {"clips": rises, "frames": rises, "score": True}},
    ]  # fmt: skip
    tables = features_tables(rows)
    assert len(tables) == 3
    assert "0.1 → 0.5 → 1" in tables[0]
    assert "2 of 4" in tables[0]
    assert "| 99 % |" in tables[1]
    assert all(len({len(line) for line in _cells(table)}) == 1 for table in tables)
