"""What to choose, and where fewer steps is better."""

from __future__ import annotations

import copy

import pytest
from bench_rows import CURVE, bench_rows, points

from diffeff.eval.render.advice import beaten, choices, curves, front, sentences, verdict
from diffeff.eval.render.records import cells


@pytest.mark.parametrize(
    ("speed", "psnr", "standing", "expected"),
    [
        (2.5, 46.0, "better", 45.0),
        (2.5, 45.4, "unclear", 45.0),
        (2.5, 44.0, "worse", 45.0),
        (4.5, 36.0, "better", 35.0),
        (1.5, 45.0, "worse", None),  # slower and further away than 15 steps
        (1.5, 60.0, "alone", None),  # no run of fewer steps is that slow
        (7.0, 31.0, "better", None),  # faster and closer than the fastest, though not than all
        (7.0, 29.0, "alone", None),
    ],
)
def test_verdict_is_at_equal_speed(speed: float, psnr: float, standing: str, expected: float | None) -> None:
    found = points(*CURVE, ("plan", "mine", speed, psnr))
    judged = verdict(found[-1], found)
    assert judged.standing == standing
    assert judged.expected == (None if expected is None else pytest.approx(expected))


def test_without_fewer_steps_nothing_is_comparable() -> None:
    found = points(("plan", "mine", 2.0, 50.0))
    assert verdict(found[-1], found).standing == "alone"
    assert verdict(found[0], found).standing == "alone"


def test_front_is_what_nothing_beats() -> None:
    found = points(
        ("plan", "a", 2.0, 50.0), ("peer", "b", 1.9, 49.0), ("peer", "c", 3.0, 40.0), ("plan", "d", 3.0, 41.0)
    )
    assert [cell.label for cell in front(found)] == ["a", "d"]


def test_curves_are_sorted_by_speed_and_kept_apart_by_solver() -> None:
    found = cells(bench_rows()[::-1])
    assert list(curves(found)) == ["fewer steps, UniPC order 2", "fewer steps"]
    for curve in curves(found).values():
        speeds = [cell.speed.value for cell in curve if cell.speed]
        assert speeds == sorted(speeds)
        assert len(speeds) == 6


def test_choice_is_the_fastest_and_among_equals_the_closest() -> None:
    found = points(("plan", "near", 2.00, 60.0), ("plan", "far", 2.02, 51.0), ("plan", "fast", 3.0, 45.0))
    chosen = choices(found)
    assert [(c.floor, c.cell.label) for c in chosen] == [(50.0, "near"), (40.0, "fast")]  # 30 dB: fast again, left out
    assert all(c.other is None for c in chosen)


def test_choice_follows_the_prompt_and_is_faster_than_plain() -> None:
    found = points(("plan", "deaf", 3.0, 45.0), ("plan", "slow", 0.9, 60.0), ("plan", "good", 1.5, 42.0))
    deaf = copy.deepcopy(dict(found[1].row))
    deaf["adherence"]["all"] = {"right": 10, "trials": 50, "accuracy": 0.2, "interval95": [0.11, 0.33]}
    found = cells([found[0].row, deaf, found[2].row, found[3].row])
    assert {c.cell.label for c in choices(found)} == {"good"}


def test_sentences_name_the_choice_its_rival_and_what_is_beaten() -> None:
    said = sentences(
        points(*CURVE, ("plan", "mine", 2.5, 52.0), ("plan", "lost", 2.5, 44.0), ("peer", "theirs", 2.4, 43.0))
    )
    assert said[0] == (
        "Practically identical to plain (50 dB or more): mine, 2.50x at 52.0 dB. "
        "Next, the best with fewer steps: fewer steps, 15 steps, 2.00x at 50.0 dB."
    )
    assert any(line.startswith("Fewer steps is better than lost (2.50x at 44.0 dB): fewer steps, ") for line in said)
    assert any("Fewer steps is better than theirs" in line for line in said)


def test_sweeps_are_counted_not_listed() -> None:
    lines = beaten(cells(bench_rows()))
    assert "cache-dit DBCache (4 of 4 settings)" in lines[-1]
    assert len(lines) <= 2


def test_nothing_to_choose_is_said() -> None:
    assert sentences(points(("plan", "mine", 0.8, 20.0))) == ["No arm was faster than plain at 30 dB or more."]
