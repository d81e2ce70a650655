"""What the plot of speed against PSNR shows and where, for the PNG and for the page: axes, sweeps, markers, labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffeff.errors import ConfigError
from diffeff.eval.render.advice import curves
from diffeff.eval.render.records import Cell
from diffeff.eval.render.style import MARKERS, Point, look

__all__ = ["Frame", "frame_of", "groups_of", "labels_of", "lines_of", "markers_of", "rated_of"]


EXACT = 100.0
"""PSNR, in dB, from which on an arm differs by rounding only."""


@dataclass(frozen=True)
class Frame:
    """Limits of both axes. Exact arms (identical clips, which have no finite PSNR, and such as differ by rounding)
    stand at `ceiling`, above all others."""

    x: tuple[float, float]
    y: tuple[float, float]
    ceiling: float
    exact: bool

    def spot(self, cell: Cell) -> Point:
        """Where a cell stands, in speed-up and dB. Raises ConfigError for one without the two numbers."""
        if cell.speed is None or cell.psnr is None:
            raise ConfigError(f"{cell.label} has no speed-up or no PSNR and cannot be plotted")
        return cell.speed.value, min(cell.psnr.value, self.ceiling)

    def line(self, cells: Sequence[Cell]) -> list[Point]:
        """The line through cells; exact ones have no place on it."""
        return [self.spot(cell) for cell in cells if cell.psnr and cell.psnr.value < EXACT]


def rated_of(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that can be plotted. Raises ConfigError when there are none."""
    shown = [cell for cell in cells if cell.rated]
    if not shown:
        raise ConfigError("nothing to plot: no arm has a speed-up and a PSNR. Measure with `diffeff bench`.")
    return shown


def frame_of(shown: Sequence[Cell]) -> Frame:
    """Limits with room for labels around the rated cells."""
    speeds = [cell.speed.value for cell in shown if cell.speed]
    heights = [cell.psnr.value for cell in shown if cell.psnr and cell.psnr.value < EXACT]
    exact, heights = len(heights) < len(shown), heights or [30.0, 50.0]
    room = max(max(heights) - min(heights), 6.0)
    top = max(heights) + (0.26 if exact else 0.14) * room
    x = min(0.9, min(speeds) * 0.95), max(speeds) * 1.08 + 0.1
    return Frame(x, (min(heights) - 0.12 * room, top), max(heights) + 0.16 * room, exact)


def groups_of(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The arms to compare, one list per sweep, by rising speed; fewer steps are not among them (`curves` has those)."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.rated and cell.kind != "fewer-steps":
            groups.setdefault(cell.group, []).append(cell)
    return {name: sorted(group, key=lambda c: c.speed.value if c.speed else 0.0) for name, group in groups.items()}


def markers_of(groups: dict[str, list[Cell]]) -> dict[str, str]:
    """A marker per sweep: the package's own, then others for its further sweeps; ours are all circles."""
    used: dict[str, int] = {}
    found = {}
    others = [marker for marker in MARKERS if marker != "o"]
    for name, group in groups.items():
        package = group[0].package
        own = look(package).marker
        first = others.index(own) if own in others else 0
        found[name] = "o" if package == "diffeff" else others[(first + used.get(package, 0)) % len(others)]
        used[package] = used.get(package, 0) + 1
    return found


def labels_of(shown: Sequence[Cell]) -> list[tuple[Cell, str, bool]]:
    """(cell, label, strong) of what is labelled, most important first: our plans, the first curve, numbers of steps.

    Everything else has its entry in the legend.
    """
    ours = [(name, group) for name, group in groups_of(shown).items() if group[0].package == "diffeff"]
    found = [(_own(group), name, True) for name, group in ours]
    found += [(curve[-1], name, True) for name, curve in list(curves(shown).items())[:1]]
    own = next(iter(curves(shown).values()), [])
    return found + [(cell, str(cell.steps), False) for cell in own[:-1] if cell.steps]


def lines_of(shown: Sequence[Cell], frame: Frame) -> list[list[Point]]:
    """Every line of the plot, in speed-up and dB: curves, sweeps, and the quartiles of each arm's speed-up."""
    lines = [frame.line(line) for line in (*curves(shown).values(), *groups_of(shown).values())]
    for group in groups_of(shown).values():
        lines += [[(c.speed.low, frame.spot(c)[1]), (c.speed.high, frame.spot(c)[1])] for c in group if c.speed]
    return lines


def _own(group: Sequence[Cell]) -> Cell:
    """The cell of a sweep that has the plan's own settings; the slowest one when none has."""
    return next((cell for cell in group if not cell.row["arm"].get("options")), group[0])
