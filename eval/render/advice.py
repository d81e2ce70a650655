"""What the numbers of one run say: which arm to choose, and where plain diffusers with fewer steps does better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from diffeff.eval.render.records import Cell, Spread

__all__ = ["TIERS", "Choice", "Verdict", "beaten", "choices", "curves", "front", "sentences", "verdict"]

TIERS: tuple[tuple[float, str], ...] = (
    (50.0, "practically identical to plain"),
    (40.0, "the same as plain to the eye"),
    (30.0, "close to plain, details differ"),
)
"""PSNR to plain in dB and what it means to the eye, for choosing."""

_TIE = 0.95
Standing = Literal["better", "unclear", "worse", "alone"]


@dataclass(frozen=True)
class Verdict:
    """How an arm stands against fewer steps at its own speed.

    `better`: closer to plain's clip than fewer steps are; `worse`: fewer steps are; `unclear`: inside the interval;
    `alone`: no run of fewer steps is comparable. `rival` is a run of fewer steps that is ahead in both, or the nearest
    in speed, and `expected` the PSNR that the curve of fewer steps has at the arm's speed, interpolated between two of
    its runs.
    """

    standing: Standing
    rival: Cell | None = None
    expected: float | None = None

    @property
    def words(self) -> str:
        return _WORDS[self.standing]


_WORDS: dict[Standing, str] = {
    "better": "beats fewer steps",
    "unclear": "no clear difference",
    "worse": "fewer steps is better",
    "alone": "not comparable",
}


@dataclass(frozen=True)
class Choice:
    """The arm to take for at least `floor` dB, and the next best of another kind."""

    floor: float
    meaning: str
    cell: Cell
    other: Cell | None


def _speed(cell: Cell) -> Spread:
    return cell.speed or Spread(math.nan, math.nan, math.nan)


def _psnr(cell: Cell) -> Spread:
    return cell.psnr or Spread(math.nan, math.nan, math.nan)


def front(cells: Iterable[Cell]) -> list[Cell]:
    """The Pareto front by speed: arms that no other one beats in both speed-up and PSNR."""
    best, kept = -math.inf, []
    for cell in sorted((c for c in cells if c.rated), key=lambda c: (-_speed(c).value, -_psnr(c).value)):
        if _psnr(cell).value > best:
            best = _psnr(cell).value
            kept.append(cell)
    return kept[::-1]


def curves(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The runs of fewer steps, one curve per solver, by rising speed."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.kind == "fewer-steps" and cell.rated:
            found.setdefault(cell.group, []).append(cell)
    return {name: sorted(curve, key=lambda c: _speed(c).value) for name, curve in found.items()}


def verdict(cell: Cell, cells: Iterable[Cell]) -> Verdict:
    """`cell` against the fewer-steps runs among `cells`: PSNR at equal speed.

    It is judged by the interval of its mean PSNR, over the 95 % interval of its median speed-up: what a little more or
    less speed would turn round is `unclear`.
    """
    steps = curves(cells)
    if not cell.rated or cell.kind == "fewer-steps" or not steps:
        return Verdict("alone")
    runs = [run for curve in steps.values() for run in curve]
    expected = _expected(steps, _speed(cell).value)
    return Verdict(_standing(cell, steps, runs), _rival(cell, runs), expected)


def _standing(cell: Cell, steps: Mapping[str, Sequence[Cell]], runs: Sequence[Cell]) -> Standing:
    own, speed, doubt = _psnr(cell), _speed(cell).value, _doubt(cell)
    if any(_speed(run).value >= speed + doubt and _psnr(run).low > own.high for run in runs):
        return "worse"
    heights = [_expected(steps, speed - doubt), _expected(steps, speed), _expected(steps, speed + doubt)]
    known = [height for height in heights if height is not None]
    if known and heights[1] is not None:
        return "better" if max(known) < own.low else "worse" if min(known) > own.high else "unclear"
    fastest = max(runs, key=lambda run: _speed(run).value)
    beyond = speed >= _speed(fastest).value and own.value >= _psnr(fastest).value  # still fewer steps are further away
    return "better" if beyond else "alone"


def _doubt(cell: Cell) -> float:
    """Half the 95 % interval of a median by its quartiles and number of prompts (McGill, Tukey and Larsen 1978)."""
    speed = _speed(cell)
    return 1.57 * (speed.high - speed.low) / math.sqrt(max(int(cell.row.get("prompts") or 1), 1))


def _rival(cell: Cell, runs: Sequence[Cell]) -> Cell:
    """The closest run of those that are faster and closer to plain than `cell`; without such, the nearest in speed."""
    ahead = [run for run in runs if _speed(run).value >= _speed(cell).value and _psnr(run).value > _psnr(cell).value]
    if ahead:
        return max(ahead, key=lambda run: (_psnr(run).value, _speed(run).value))
    return min(runs, key=lambda run: abs(_speed(run).value - _speed(cell).value))


def _expected(steps: Mapping[str, Sequence[Cell]], speed: float) -> float | None:
    """The best PSNR that any curve has at `speed`."""
    heights = [height for curve in steps.values() if (height := _height(curve, speed)) is not None]
    return max(heights, default=None)


def _height(curve: Sequence[Cell], speed: float) -> float | None:
    """PSNR of a curve at `speed`, linear between neighbours; None outside of it."""
    for left, right in pairwise(curve):
        x0, x1 = _speed(left).value, _speed(right).value
        if x0 <= speed <= x1 and math.isfinite(_psnr(left).value):
            share = (speed - x0) / (x1 - x0) if x1 > x0 else 0.0
            return _psnr(left).value + share * (_psnr(right).value - _psnr(left).value)
    return None


def choices(cells: Sequence[Cell]) -> list[Choice]:
    """The arm to choose for each tier of TIERS that some arm reaches while following the prompt as plain does; a tier
    whose arm is the one of a stricter tier is left out.

    The fastest one; of those at most 5 % slower, which is nothing on most machines, the one closest to plain.
    """
    made: list[Choice] = []
    for floor, meaning in TIERS:
        able = [c for c in cells if c.rated and _psnr(c).value >= floor and _speed(c).value > 1 and _follows(c, cells)]
        if able:
            cell = _best(able)
            if any(choice.cell is cell for choice in made):
                continue
            others = [c for c in able if (c.kind == "fewer-steps") != (cell.kind == "fewer-steps")]
            made.append(Choice(floor, meaning, cell, _best(others) if others else None))
    return made


def _best(able: Sequence[Cell]) -> Cell:
    fastest = max(able, key=lambda c: _speed(c).value)
    tied = [c for c in able if _speed(c).value >= _TIE * _speed(fastest).value]
    return max(tied, key=lambda c: (_psnr(c).value, _speed(c).value))


def _follows(cell: Cell, cells: Iterable[Cell]) -> bool:
    """Whether it follows its captions no worse than plain, as far as the intervals can tell."""
    plain = next((c for c in cells if c.is_plain), None)
    if plain is None or "all" not in plain.adherence or "all" not in cell.adherence:
        return True
    return cell.adherence["all"].share.high >= plain.adherence["all"].share.low


def sentences(cells: Sequence[Cell]) -> list[str]:
    """The advice in sentences: what to choose for which closeness, then where fewer steps is the better choice."""
    lines = [*map(_chosen, choices(cells)), *beaten(cells)]
    return lines or ["No arm was faster than plain at 30 dB or more."]


def _chosen(choice: Choice) -> str:
    line = (
        f"{choice.meaning.capitalize()} ({choice.floor:.0f} dB or more): {choice.cell.label}, {_figures(choice.cell)}."
    )
    if choice.other is None:
        kind = "none of the plans and peers" if choice.cell.kind == "fewer-steps" else "no run of fewer steps"
        return f"{line[:-1]}; {kind} reaches that."
    rest = "the best plan or peer" if choice.cell.kind == "fewer-steps" else "the best with fewer steps"
    return f"{line} Next, {rest}: {choice.other.label}, {_figures(choice.other)}."


def beaten(cells: Sequence[Cell]) -> list[str]:
    """Where fewer steps does better: a sentence per arm, and one for all sweeps with how many settings are beaten."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.rated and cell.kind != "fewer-steps":
            groups.setdefault(cell.group, []).append(cell)
    lines, swept = [], []
    for name, members in groups.items():
        lost = [cell for cell in members if verdict(cell, cells).standing == "worse"]
        if len(members) == 1:
            lines += [_one_beaten(cell, cells) for cell in lost]
        elif lost:
            swept.append(f"{name} ({len(lost)} of {len(members)} settings)")
    return lines + ([f"Fewer steps is also better than {_listed(swept)}."] if swept else [])


def _one_beaten(cell: Cell, cells: Sequence[Cell]) -> str:
    rival = verdict(cell, cells).rival
    better = "" if rival is None else f": {rival.label} gives {_figures(rival)}"
    return f"Fewer steps is better than {cell.label} ({_figures(cell)}){better}."


def _figures(cell: Cell) -> str:
    psnr = _psnr(cell).value
    close = ", identical" if math.isinf(psnr) else f" at {psnr:.1f} dB"
    return f"{_speed(cell).value:.2f}x{close}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
