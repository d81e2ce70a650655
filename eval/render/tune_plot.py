"""The plot of a tuning run: every candidate labelled, fewer steps as the curve to beat, the Pareto front underlaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffeff.errors import ConfigError
from diffeff.eval.render.plots import STYLE, figure_of, library
from diffeff.eval.render.style import FRONT, PAPER, Point, look, place, samples

__all__ = ["tune_plot"]

Entry = Mapping[str, Any]

_MARKERS = {"steps": ".", "exact": "P", "preset": "s", "guidance": "D", "schedule": "o", "solver": "^"}
_PACKAGES = {
    "exact": "plain",
    "steps": "fewer-steps",
    "schedule": "diffeff",
    "solver": "deepcache",
    "guidance": "tomesd",
}
"""Whose colour each kind has."""
_NAMES = {
    "steps": "fewer steps",
    "exact": "exact methods",
    "preset": "presets",
    "guidance": "guidance skipped",
    "schedule": "scheduled cache",
    "solver": "fitted solver",
}


def tune_plot(tuned: Entry, title: str) -> Any:
    """Speed-up against PSNR of all candidates of `Tuned.to_dict()`; filled points were measured on fresh seeds.

    Raises ConfigError when there is nothing to show, MissingExtra without matplotlib.
    """
    shown = [p for p in tuned["points"] if p["kind"] != "plain" and p["psnr"] is not None]
    if not shown:
        raise ConfigError("nothing to plot: no candidate was tried")
    figure, ((axes,),) = figure_of(6.2)
    with library().rc_context(STYLE):
        best = sorted((_spot(p) for p in shown if p["front"]), key=lambda s: s[0])
        axes.plot(
            *_columns(best), color=FRONT, lw=9, alpha=0.55, solid_capstyle="round", zorder=1, label="Pareto front"
        )
        for kind, name in _NAMES.items():
            _draw(axes, [p for p in shown if p["kind"] == kind], kind, name)
        _target(axes, tuned["target"])
        axes.set(xlabel="speed-up over plain", ylabel="PSNR to plain, dB")
        axes.set_title(title)
        axes.grid(True, lw=0.8)
        axes.margins(0.08)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.8)
        _write_labels(figure, axes, shown, best)
    return figure


def _spot(entry: Entry) -> Point:
    found = entry["measured"]
    return (entry["expected_speedup"], entry["psnr"]) if found is None else (found["speedup"], found["psnr"])


def _columns(spots: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in spots], [y for _, y in spots]


def _colour(kind: str) -> str:
    return look(_PACKAGES.get(kind, "cache-dit")).light


def _draw(axes: Any, entries: Sequence[Entry], kind: str, name: str) -> None:
    if not entries:
        return
    colour, spots = _colour(kind), sorted(_spot(p) for p in entries)
    style = {"marker": _MARKERS[kind], "ms": 8 if kind != "steps" else 7, "mec": colour, "mew": 1.1, "ls": "none"}
    if kind == "steps":
        axes.plot(*_columns(spots), color=colour, lw=1.6, zorder=2)
    open_, filled = [p for p in entries if p["measured"] is None], [p for p in entries if p["measured"] is not None]
    axes.plot(*_columns([_spot(p) for p in open_]), color=colour, mfc=PAPER, zorder=4, **style)
    axes.plot(*_columns([_spot(p) for p in filled]), color=colour, mfc=colour, zorder=5, **style)
    axes.plot([], [], color=colour, mfc=colour, label=name, **{**style, "ls": "-" if kind == "steps" else "none"})
    for entry in filled:
        x, y = _spot(entry)
        m = entry["measured"]
        axes.errorbar(x, y, xerr=[[x - m["speedup_low"]], [m["speedup_high"] - x]], yerr=[[y - m["psnr_low"]],
                      [m["psnr_high"] - y]], fmt="none", ecolor=colour, elinewidth=1, alpha=0.5, zorder=3)  # fmt: skip


def _target(axes: Any, target: Entry) -> None:
    style = {"color": "#9aa3ad", "lw": 1, "ls": (0, (4, 3)), "zorder": 1}
    if target["min_psnr"] is not None:
        axes.axhline(target["min_psnr"], **style)
    else:
        axes.axvline(target["min_speedup"], **style)


def _write_labels(figure: Any, axes: Any, shown: Sequence[Entry], best: Sequence[Point]) -> None:
    """Every point gets its label where there is room without covering another, the front first."""
    figure.canvas.draw()
    figure.set_layout_engine("none")
    ranked = sorted(shown, key=lambda p: (p["measured"] is None, not p["front"]))
    texts = [_text(axes, entry) for entry in ranked]
    renderer, dots = figure.canvas.get_renderer(), figure.dpi / 72
    boxes = [text.get_window_extent(renderer) for text in texts]
    anchors = [_pixel(axes, _spot(entry)) for entry in ranked]
    window = axes.get_window_extent(renderer)
    steps = sorted(_spot(p) for p in shown if p["kind"] == "steps")
    lines = [_pixel(axes, spot) for line in (steps, best) for spot in samples(line)]
    bounds = window.x0 + 4 * dots, window.y0 + 4 * dots, window.x1 - 2 * dots, window.y1 - 2 * dots
    sizes = [(box.width, box.height) for box in boxes]
    found = place(anchors, sizes, bounds, anchors, lines, gap=6 * dots, margin=3 * dots)
    for text, anchor, corner in zip(texts, anchors, found, strict=True):
        if corner is None:
            text.remove()
        else:
            text.set_position(((corner[0] - anchor[0]) / dots, (corner[1] - anchor[1]) / dots))


def _text(axes: Any, entry: Entry) -> Any:
    from matplotlib.patheffects import withStroke

    label = entry["label"].replace("schedule of ", "").replace("fitted solver of ", "fit ").replace(", corrected", " +")
    return axes.annotate(
        label,
        _spot(entry),
        xytext=(0, 0),
        textcoords="offset points",
        color=_colour(entry["kind"]),
        fontsize=8.2,
        va="bottom",
        ha="left",
        zorder=6,
        path_effects=[withStroke(linewidth=2.2, foreground=PAPER)],
    )


def _pixel(axes: Any, spot: Point) -> Point:
    x, y = axes.transData.transform(spot)
    return float(x), float(y)
