"""How fast each contender is at the same closeness to plain: its own sweep, interpolated at one PSNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from diffeff.eval.render.advice import curves
from diffeff.eval.render.layout import groups_of
from diffeff.eval.render.markup import Markup
from diffeff.eval.render.records import Cell
from diffeff.eval.render.tables import DASH, markdown

__all__ = ["LEVELS", "AtLevel", "equal_quality_table", "is_tuned", "speed_at"]

LEVELS = (25.0, 30.0, 35.0)
"""PSNR to plain, in dB, at which contenders are compared."""


@dataclass(frozen=True)
class AtLevel:
    """A speed-up at one PSNR. `bound`: the sweep ends above that PSNR, so that it is at least so fast there."""

    speed: float
    bound: bool = False

    def __str__(self) -> str:
        return f"{'≥ ' if self.bound else ''}{self.speed:.2f}x"


def is_tuned(cell: Cell) -> bool:
    """Whether the arm is a plan that `diffeff tune` made for this model: its file says for how many dB."""
    return cell.kind == "plan" and cell.group.endswith(" tuned")


def speed_at(cells: Sequence[Cell], level: float) -> AtLevel | None:
    """Speed-up of one sweep at `level` dB, linear between the two points of its front that enclose it.

    Only points count that no other of the sweep beats in both. Where even its fastest point is nearer to plain than
    `level`, that point's speed-up is a lower bound; where none is as near, there is no figure.
    """
    points = _front(cells)
    if not points or points[0][0] < level:
        return None
    if points[-1][0] >= level:
        return AtLevel(points[-1][1], bound=points[-1][0] > level)
    for (above, slow), (below, fast) in pairwise(points):
        if above >= level > below:
            share = (above - level) / (above - below)
            return AtLevel(slow + share * (fast - slow))
    return None


def _front(cells: Sequence[Cell]) -> list[tuple[float, float]]:
    """(PSNR, speed-up), by rising speed and falling PSNR."""
    found: list[tuple[float, float]] = []
    points = [(c.psnr.value, c.speed.value) for c in cells if c.rated and c.psnr is not None and c.speed is not None]
    for psnr, speed in sorted(points, key=lambda p: (-p[1], -p[0])):
        if not found or psnr > found[-1][0]:
            found.append((psnr, speed))
    return found[::-1]


def equal_quality_table(cells: Sequence[Cell]) -> str:
    """Every contender's speed-up at each level, the tuned plan first, and how far it is ahead of the best other one.

    diffeff's own plans but the tuned ones are left out: they are no rivals. Empty without a tuned plan.
    """
    groups = groups_of([cell for cell in cells if cell.rated])
    ours = {name: group for name, group in groups.items() if is_tuned(group[0])}
    rivals = curves(cells) | {name: group for name, group in groups.items() if group[0].package != "diffeff"}
    if not ours:
        return ""
    tuned = [cell for group in ours.values() for cell in group]
    best = [_best(rivals, level) for level in LEVELS]
    rows = [["tuned plan", *(_text(speed_at(tuned, level)) for level in LEVELS)]]
    rows += [[name, *(_text(speed_at(group, level)) for level in LEVELS)] for name, group in rivals.items()]
    rows = [row for row in rows if set(row[1:]) != {DASH}]
    rows.append(
        [Markup("**tuned plan over the best other**"), *map(_ahead, [speed_at(tuned, n) for n in LEVELS], best)]
    )
    return markdown(["speed-up at", *(f"{level:.0f} dB" for level in LEVELS)], rows)


def _best(rivals: dict[str, list[Cell]], level: float) -> AtLevel | None:
    found = [at for group in rivals.values() if (at := speed_at(group, level)) is not None]
    return max(found, key=lambda at: at.speed, default=None)


def _ahead(own: AtLevel | None, other: AtLevel | None) -> str:
    if own is None or other is None:
        return DASH
    return f"{'≥ ' if own.bound else ''}{own.speed / other.speed:.2f}x{' of a lower bound' if other.bound else ''}"


def _text(at: AtLevel | None) -> str:
    return DASH if at is None or math.isnan(at.speed) else str(at)
