"""PNG plots of recorded rows, for documents: light ground, no colour without a marker, no label on another one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from diffeff.errors import ConfigError, MissingExtra
from diffeff.eval.render.records import Adherence, Cell, Row
from diffeff.eval.render.style import FAINT, GRID, INK, PAPER, look
from diffeff.eval.render.tables import matrix_grid, status_word
from diffeff.files import replacing

__all__ = ["STYLE", "adherence_bars", "figure_of", "library", "matrix_map", "memory_bars", "save", "scaling"]

WIDTH = 8.0
"""Inches: at SCALE dots per inch a plot is as wide as a README shows pictures, times two."""
SCALE = 220

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "diffeff",
}


def library() -> Any:
    """matplotlib, or MissingExtra saying how to install it."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtra("plots need matplotlib: pip install 'diffeff[eval]'") from error
    return matplotlib


def figure_of(height: float, columns: int = 1, lines: int = 1, width: float = WIDTH) -> tuple[Any, list[list[Any]]]:
    """A figure of that many inches without pyplot's global state, and its axes, line by line."""
    matplotlib = library()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height), dpi=SCALE, layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False)
    return figure, [list(line) for line in axes]


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    with replacing(path) as temporary, library().rc_context(STYLE):
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def memory_bars(cells: Sequence[Cell], title: str) -> Any:
    """Peak memory as bars, one per sweep (its largest): pale is what the loaded model takes, full what a call adds.

    Raises ConfigError when no cell has a memory.
    """
    measured = _largest(cells)
    if not measured:
        raise ConfigError("nothing to plot: no arm has a peak memory. Measure with `diffeff bench`.")
    figure, ((axes,),) = figure_of(1.1 + 0.3 * len(measured))
    with library().rc_context(STYLE):
        for number, cell in enumerate(measured):
            _memory_bar(axes, number, cell)
        if plain := [cell for cell in measured if cell.is_plain]:
            axes.axvline(_mebibytes(plain[0])[0], color=INK, lw=1, ls=(0, (4, 3)))
        _name_bars(axes, [cell.label if cell.is_plain else cell.group for cell in measured])
        axes.set_xlim(0, max(_mebibytes(cell)[0] for cell in measured) * 1.12)
        axes.set_ylim(len(measured) - 0.4, -0.6)
        axes.set(xlabel="peak memory of the process, MiB (full colour: added by the call)")
        axes.set_title(title)
    return figure


def _largest(cells: Sequence[Cell]) -> list[Cell]:
    groups: dict[str, Cell] = {}
    for cell in cells:
        held = groups.setdefault(cell.group, cell) if cell.peak_bytes is not None else cell
        if (cell.peak_bytes or 0) > (held.peak_bytes or 0):
            groups[cell.group] = cell
    return list(groups.values())


def _mebibytes(cell: Cell) -> tuple[float, float]:
    """The peak, and what the call added to it."""
    added = (cell.row.get("peak_memory") or {}).get("above_load_bytes") or 0
    return (cell.peak_bytes or 0) / 2**20, added / 2**20


def _memory_bar(axes: Any, number: int, cell: Cell) -> None:
    peak, added = _mebibytes(cell)
    colour = look(cell.package).light
    axes.barh(number, peak - added, color=colour, alpha=0.35, height=0.66)
    axes.barh(number, added, left=peak - added, color=colour, height=0.66)
    axes.text(peak, number, f"  {peak:,.0f}", va="center", fontsize=9)


def _name_bars(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, color=INK, fontsize=9.5)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", lw=0.8)


def adherence_bars(cells: Sequence[Cell], title: str) -> Any:
    """Share of clips that show each attribute of their caption, with 95 % intervals, one panel per attribute.

    Raises ConfigError when no cell has an adherence.
    """
    measured = [cell for cell in cells if cell.adherence]
    names = list(dict.fromkeys(name for cell in measured for name in cell.adherence))
    if not names:
        raise ConfigError("nothing to plot: adherence was measured for no arm.")
    labels = [textwrap.fill(cell.label, 42) for cell in measured]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, (panels,) = figure_of(1.1 + 0.25 * lines, len(names), width=max(WIDTH, 3.4 + 1.35 * len(names)))
    with library().rc_context(STYLE):
        for number, (axes, name) in enumerate(zip(panels, names, strict=True)):
            for place_, cell in enumerate(measured):
                _whisker(axes, place_, cell.adherence.get(name), look(cell.package).light)
            _name_bars(axes, labels if number == 0 else [""] * len(labels))
            axes.set_ylim(len(measured) - 0.4, -0.6)
            axes.set_xlim(-3, 105)
            axes.set_xticks([0, 50, 100])
            axes.set_title("whole caption" if name == "all" else name, fontsize=10, loc="center")
        figure.suptitle(f"{title}, %", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def _whisker(axes: Any, place_: int, entry: Adherence | None, colour: str) -> None:
    if entry is None:
        return
    share = entry.share
    axes.plot(
        [100 * share.low, 100 * share.high], [place_, place_], color=colour, lw=5, alpha=0.35, solid_capstyle="butt"
    )
    axes.plot([100 * share.value], [place_], marker="o", ms=5.5, color=colour)


def scaling(rows: Sequence[Row], title: str) -> Any:
    """Time, and memory under it where measured, against each axis: log-log, with the exponent and its 95 % interval.

    Raises ConfigError without a row.
    """
    if not rows:
        raise ConfigError("nothing to plot: no scaling rows. Measure with `diffeff bench scaling`.")
    names = list(dict.fromkeys(str(row["axis"]) for row in rows))
    shown = [quantity for quantity in _QUANTITIES if any(_points(row, quantity[0], 1.0)[0] for row in rows)]
    figure, panels = figure_of(3.0 * len(shown) + 0.3, len(names), len(shown), width=max(WIDTH, 2.7 * len(names)))
    with library().rc_context(STYLE):
        for line, quantity in zip(panels, shown, strict=True):
            for axes, name in zip(line, names, strict=True):
                _scaling_panel(axes, [row for row in rows if row["axis"] == name], quantity)
                axes.set_xlabel(next((row["unit"] for row in rows if row["axis"] == name and row.get("unit")), name))
            line[0].set_ylabel(quantity[2])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


_QUANTITIES = (
    ("seconds", "slope_time", "seconds per call", 1.0),
    ("above_load_bytes", "slope_memory", "memory above load, MiB", 2.0**20),
)
"""Field of a point, field of its slope, label, unit."""


def _points(row: Row, field: str, unit: float) -> tuple[list[float], list[float]]:
    found = [(point["x"], point[field] / unit) for point in row["points"] if (point.get(field) or 0) > 0]
    return [x for x, _ in found], [y for _, y in found]


def _scaling_panel(axes: Any, rows: Sequence[Row], quantity: tuple[str, str, str, float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    field, slope, _, unit = quantity
    ticks: set[float] = set()
    for row, (marker, colour) in zip(rows, cycle(_SERIES.items()), strict=False):
        x, y = _points(row, field, unit)
        ticks |= set(x)
        axes.loglog(x, y, marker=marker, ms=6, color=colour, lw=1.6, label=_slope_label(row, slope))
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high < 4 * low:  # a nearly constant quantity must look constant
        axes.set_ylim((low * high) ** 0.5 / 2, (low * high) ** 0.5 * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", lw=0.8)
    axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.24), handlelength=1.4)


_SERIES = {"o": "#0072b2", "s": "#d55e00", "^": "#00795a", "D": "#a8487f"}


def _slope_label(row: Row, field: str) -> str:
    slope, model = row.get(field) or {}, str(row["model"]) + (" with plan" if row.get("plan") else "")
    if slope.get("value") is None:
        return model
    interval = "" if slope.get("low") is None else f" [{slope['low']:.2f}, {slope['high']:.2f}]"
    return f"{model}: $x^{{{slope['value']:.2f}}}${interval}"


_STATUS = {"refused": "#dfe5ec", "idle": "#fdf0c9", "fails": "#f3c7bd"}


def matrix_map(rows: Sequence[Row], title: str) -> Any:
    """Every method on every family: colour and word for works (with the share of work left), refused, no effect, fails.

    Raises ConfigError without a row.
    """
    if not rows:
        raise ConfigError("nothing to plot: no matrix rows. Measure with `diffeff bench matrix`.")
    methods, families, pairs = matrix_grid(rows)
    figure, ((axes,),) = figure_of(1.3 + 0.34 * len(methods), width=max(WIDTH, 2.6 + 1.0 * len(families)))
    with library().rc_context(STYLE):
        for (method, family), row in pairs.items():
            _tile(axes, families.index(family), methods.index(method), row)
        axes.set_xlim(-0.5, len(families) - 0.5)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xticks(range(len(families)), families, color=INK, fontsize=9)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(methods)), methods, color=INK, fontsize=9.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, pad=12)
    return figure


def _tile(axes: Any, column: int, line: int, row: Row) -> None:
    from matplotlib.patches import Rectangle

    status, left = str(row["status"]), row.get("compute_left")
    colour, word = _STATUS.get(status, _green(left)), status_word(status)
    if status == "works" and left is not None:
        word = f"{100 * left:.0f} %"
    axes.add_patch(Rectangle((column - 0.47, line - 0.44), 0.94, 0.88, facecolor=colour, linewidth=0))
    axes.text(column, line, word, ha="center", va="center", fontsize=8.8)


def _green(left: float | None) -> tuple[float, float, float]:
    """The less work is left, the deeper; always light enough for dark letters."""
    share = min(max((1 - (1 if left is None else left)) / 0.6, 0), 1)
    pale, deep = (0.91, 0.96, 0.94), (0.45, 0.77, 0.64)
    red, green, blue = (a + share * (b - a) for a, b in zip(pale, deep, strict=True))
    return red, green, blue
