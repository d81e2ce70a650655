"""Speed at equal PSNR: interpolation on each sweep, bounds, the table."""

from __future__ import annotations

import pytest
from bench_rows import CURVE, points

from diffeff.eval.render.equal_quality import equal_quality_table, speed_at
from diffeff.eval.render.records import Cell


def sweep(*pairs: tuple[float, float]) -> list[Cell]:
    return points(*(("peer", f"a, {n}", speed, psnr) for n, (speed, psnr) in enumerate(pairs)))[1:]


def test_between_two_points_it_is_linear_in_decibels() -> None:
    found = speed_at(sweep((2.0, 40.0), (4.0, 30.0)), 35.0)
    assert found is not None
    assert found.speed == pytest.approx(3.0)
    assert not found.bound


def test_points_that_another_beats_do_not_count() -> None:
    found = speed_at(sweep((2.0, 40.0), (1.5, 36.0), (4.0, 30.0)), 35.0)
    assert found is not None
    assert found.speed == pytest.approx(3.0)


def test_outside_the_sweep() -> None:
    assert speed_at(sweep((2.0, 29.0)), 30.0) is None
    assert speed_at([], 30.0) is None
    above = speed_at(sweep((2.0, 45.0), (3.0, 40.0)), 30.0)
    assert above is not None
    assert (above.speed, above.bound, str(above)) == (3.0, True, "≥ 3.00x")
    exact = speed_at(sweep((3.0, 30.0)), 30.0)
    assert exact is not None
    assert not exact.bound


def test_the_table_sets_the_tuned_plans_against_the_best_rival() -> None:
    cells = points(*CURVE, ("plan", "x-30db.json", 9.0, 32.0), ("plan", "x-25db.json", 12.0, 24.0))
    cells += points(("peer", "b, threshold 1", 5.0, 45.0), ("plan", "balanced", 100.0, 90.0))[1:]
    for cell in cells[-2:-1]:
        cell.row["arm"]["name"] = "b"
    lines = equal_quality_table(cells).splitlines()
    assert lines[0] == "| speed-up at | 25 dB | 30 dB | 35 dB |"
    assert lines[2].startswith("| tuned plan | 11.62x | 9.75x | \u2013 |")
    assert "| fewer steps | ≥ 6.00x | 6.00x | 4.50x |" in lines
    assert "| b | ≥ 5.00x | ≥ 5.00x | ≥ 5.00x |" in lines
    assert lines[-1] == "| **tuned plan over the best other** | 1.94x of a lower bound | 1.62x | \u2013 |"
    assert not any("balanced" in line for line in lines)


def test_no_table_without_a_tuned_plan() -> None:
    assert equal_quality_table(points(*CURVE)) == ""
