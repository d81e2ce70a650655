"""The plot that decides: speed-up against closeness to plain, with fewer steps as the curve to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffeff.eval.render.advice import curves, front
from diffeff.eval.render.layout import Frame, frame_of, groups_of, labels_of, lines_of, markers_of, rated_of
from diffeff.eval.render.plots import STYLE, figure_of, library
from diffeff.eval.render.records import Cell
from diffeff.eval.render.style import FRONT, GRID, PAPER, Point, look, place, samples

__all__ = ["speed_psnr"]


def speed_psnr(cells: Sequence[Cell], title: str) -> Any:
    """Speed-up against PSNR: one line per sweep, fewer steps as grey curves, the Pareto front underlaid in yellow.

    Raises ConfigError when no cell has both numbers.
    """
    shown = rated_of(cells)
    frame = frame_of(shown)
    figure, ((axes,),) = figure_of(5.4 + 0.2 * (len(groups_of(shown)) // 3))
    with library().rc_context(STYLE):
        _scale(axes, frame)
        _draw(axes, shown, frame)
        axes.set(xlabel="speed-up over plain (wall clock, median over prompts, quartiles)", ylabel="PSNR to plain, dB")
        axes.set_title(title)
        axes.grid(True, lw=0.8)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.8, handlelength=1.8)
        _write_labels(figure, axes, shown, frame)
    return figure


def _scale(axes: Any, frame: Frame) -> None:
    axes.set(xlim=frame.x, ylim=frame.y)
    axes.axvline(1, color="#9aa3ad", lw=1, ls=(0, (4, 3)), zorder=1)
    if frame.exact:
        axes.axhline(frame.ceiling, color=GRID, lw=6, zorder=0)
        across = axes.get_yaxis_transform()
        axes.text(0.995, frame.ceiling, "exact", transform=across, ha="right", va="center", fontsize=9)


def _columns(spots: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in spots], [y for _, y in spots]


def _draw(axes: Any, shown: Sequence[Cell], frame: Frame) -> None:
    best = _columns(frame.line(front(shown)))
    axes.plot(*best, color=FRONT, lw=9, alpha=0.55, solid_capstyle="round", zorder=1, label="Pareto front")
    for number, (name, curve) in enumerate(curves(shown).items()):
        dash = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))[number % 4]
        style = {"color": look("fewer-steps").light, "lw": 1.6, "ls": dash, "marker": ".", "ms": 7, "zorder": 2}
        axes.plot(*_columns(frame.line(curve)), label=name, **style)
    groups = groups_of(shown)
    markers, ours = markers_of(groups), [name for name, group in groups.items() if group[0].package == "diffeff"]
    for name, group in groups.items():
        label = name if name not in ours else "diffeff plans" if name == ours[0] else None
        _draw_group(axes, group, frame, markers[name], label)


def _draw_group(axes: Any, group: Sequence[Cell], frame: Frame, marker: str, label: str | None) -> None:
    colour = look(group[0].package).light
    x, y = _columns([frame.spot(cell) for cell in group])
    spreads = [cell.speed for cell in group if cell.speed]
    spread = [[s.value - s.low for s in spreads], [s.high - s.value for s in spreads]]
    axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=colour, elinewidth=1, alpha=0.5, zorder=3)
    style = {"color": colour, "lw": 1.1, "marker": marker, "ms": 7.5, "mec": PAPER, "mew": 0.9, "zorder": 4}
    if line := frame.line(group):  # an empty line would pull the layout to the figure's corner
        axes.plot(*_columns(line), clip_on=False, **style)
    axes.plot(x, y, clip_on=False, **(style | {"lw": 0}))
    axes.plot([], [], label=label, **style)


def _write_labels(figure: Any, axes: Any, shown: Sequence[Cell], frame: Frame) -> None:
    """As many labels as there is room for without covering a point or another label."""
    figure.canvas.draw()
    figure.set_layout_engine("none")
    entries = [(cell, _text(axes, cell, text, strong, frame)) for cell, text, strong in labels_of(shown)]
    renderer, dots = figure.canvas.get_renderer(), figure.dpi / 72
    boxes = [text.get_window_extent(renderer) for _, text in entries]
    anchors = [_pixel(axes, frame.spot(cell)) for cell, _ in entries]
    window = axes.get_window_extent(renderer)
    found = place(
        anchors,
        [(box.width, box.height) for box in boxes],
        (window.x0 + 4 * dots, window.y0 + 4 * dots, window.x1 - 2 * dots, window.y1 - 2 * dots),
        [_pixel(axes, frame.spot(cell)) for cell in shown],
        [_pixel(axes, spot) for line in lines_of(shown, frame) for spot in samples(line)],
        gap=7 * dots,
        margin=4 * dots,
        near=[not strong for _, _, strong in labels_of(shown)],
    )
    for (_, text), anchor, corner in zip(entries, anchors, found, strict=True):
        if corner is None:
            text.remove()
        else:
            text.set_position(((corner[0] - anchor[0]) / dots, (corner[1] - anchor[1]) / dots))


def _text(axes: Any, cell: Cell, text: str, strong: bool, frame: Frame) -> Any:
    from matplotlib.patheffects import withStroke

    style = {"color": look(cell.package).light, "fontsize": 9.5 if strong else 8.5, "va": "bottom", "ha": "left"}
    return axes.annotate(
        text,
        frame.spot(cell),
        xytext=(0, 0),
        textcoords="offset points",
        fontweight="bold" if strong else "normal",
        zorder=6,
        path_effects=[withStroke(linewidth=2.2, foreground=PAPER)],
        **style,
    )


def _pixel(axes: Any, spot: Point) -> Point:
    x, y = axes.transData.transform(spot)
    return float(x), float(y)
