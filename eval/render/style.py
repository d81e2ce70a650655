"""How arms look in every plot and page: one colour and marker per package, readable with any colour vision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "FAINT",
    "FRONT",
    "GRID",
    "INK",
    "LOOKS",
    "MARKERS",
    "PAPER",
    "Look",
    "Point",
    "Size",
    "look",
    "place",
    "samples",
]

Point = tuple[float, float]
Size = tuple[float, float]
Box = tuple[float, float, float, float]

INK, FAINT, GRID, PAPER, FRONT = "#18202a", "#5b6570", "#e3e6ea", "#ffffff", "#ffd97a"


@dataclass(frozen=True)
class Look:
    """Colours on light and dark ground, and a marker by matplotlib's names."""

    light: str
    dark: str
    marker: str


LOOKS: dict[str, Look] = {
    "diffeff": Look("#0072b2", "#56b4e9", "o"),
    "fewer-steps": Look("#4a5360", "#b4bcc6", "."),
    "diffusers": Look("#d55e00", "#ff9248", "s"),
    "cache-dit": Look("#a8487f", "#e79cc4", "D"),
    "deepcache": Look("#00795a", "#2fc79d", "^"),
    "tomesd": Look("#8a6d00", "#e6c84a", "v"),
    "para-attn": Look("#6a3d9a", "#b99be0", "P"),
    "torchao": Look("#9b2226", "#f08a8d", "p"),
    "plain": Look("#18202a", "#e8ebef", "*"),
}
"""After Okabe and Ito (2008), darkened to 4.5 : 1 on white. The markers tell them apart without colour."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
"""By matplotlib's names: circle, square, diamond, triangles, plus, cross, pentagon. Dots are for fewer steps."""

_OTHER = Look("#7a5230", "#cfa27c", "X")


def look(package: str) -> Look:
    """The look of a package; a new one gets brown crosses."""
    return LOOKS.get(package.lower(), _OTHER)


def samples(line: Sequence[Point], count: int = 24) -> Iterator[Point]:
    """Points along a line of points, `count` between each two."""
    for (x0, y0), (x1, y1) in pairwise(line):
        for i in range(count + 1):
            yield x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (1.0, 1.8, 2.8, 4.0, 5.5)


def place(
    anchors: Sequence[Point],
    sizes: Sequence[Size],
    bounds: Box,
    points: Sequence[Point] = (),
    lines: Sequence[Point] = (),
    gap: float = 8.0,
    margin: float = 4.0,
    near: Sequence[bool] | None = None,
) -> list[Point | None]:
    """Where each label goes so that none covers another or a point: its box's smallest corner, None without room.

    `anchors` are the points labelled, most important first, `sizes` widths and heights, `bounds` (x0, y0, x1, y1),
    `points` never to be covered, `lines` samples along curves to keep off where possible; all in one unit. `gap` is
    the nearest distance of a label to its own point, `margin` that to all others. A label that is `near` stands close
    to its point or not at all.
    """
    taken: list[Box] = []
    found: list[Point | None] = []
    for anchor, size, close in zip(anchors, sizes, near or [False] * len(anchors), strict=True):
        free = [
            (reach + _cover(box, lines, margin / 3) + 2.0 * _strays(box, anchor, points), box)
            for reach, box in _candidates(anchor, size, gap)
            if (not close or reach < 2)
            and _inside(box, bounds)
            and not any(_overlap(box, other) for other in taken)
            and not _cover(box, (*anchors, *points), margin)
        ]
        best = min(free, key=lambda entry: entry[0], default=None)
        found.append(None if best is None else best[1][:2])
        taken += [] if best is None else [best[1]]
    return found


def _candidates(anchor: Point, size: Size, gap: float) -> Iterator[tuple[float, Box]]:
    for reach in _DISTANCES:
        for direction in _DIRECTIONS:
            yield reach, _box(anchor, size, direction, gap * reach)


def _strays(box: Box, anchor: Point, points: Sequence[Point]) -> bool:
    """Whether another point is nearer to the label than its own: a reader would take it for that one's."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    own = (x - anchor[0]) ** 2 + (y - anchor[1]) ** 2
    return any((x - px) ** 2 + (y - py) ** 2 < own for px, py in points)


def _inside(box: Box, bounds: Box) -> bool:
    return bounds[0] <= box[0] and bounds[1] <= box[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _box(anchor: Point, size: Size, direction: tuple[int, int], reach: float) -> Box:
    left = anchor[0] + reach * direction[0] + size[0] * (direction[0] - 1) / 2
    low = anchor[1] + reach * direction[1] + size[1] * (direction[1] - 1) / 2
    return left, low, left + size[0], low + size[1]


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _cover(box: Box, points: Sequence[Point], margin: float) -> int:
    return sum(box[0] - margin < x < box[2] + margin and box[1] - margin < y < box[3] + margin for x, y in points)
