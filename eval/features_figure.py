"""The figure of `features_check`: distances that rise, text scores that fall, snapshots in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffeff.eval.render.plots import figure_of, save

__all__ = ["draw"]

Row = Mapping[str, Any]

#: (what, distance) -> name, colour, line, marker. After Okabe and Ito (2008), as in all our plots.
_CURVES = {
    ("clips", "frechet"): ("Fréchet, clips", "#0072b2", "-", "o"),
    ("clips", "kernel"): ("kernel, clips", "#0072b2", ":", "s"),
    ("frames", "frechet"): ("Fréchet, frames", "#d55e00", "-", "^"),
    ("frames", "kernel"): ("kernel, frames", "#d55e00", ":", "v"),
}
_WORDS = {
    "colour": ("#d55e00", "o"),
    "shape": ("#00795a", "^"),
    "motion": ("#0072b2", "s"),
    "camera": ("#a8487f", "D"),
}
_PANELS = {"noise": "Noise", "blur": "Blur", "repeat": "Dropped frames", "jpeg": "JPEG, not met in training"}


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Six panels from the rows of one check; one without rows says so. Raises MissingExtra without matplotlib."""
    figure, lines = figure_of(6.4, columns=3, lines=2, width=11.5)
    spoilt = {row["kind"]: row for row in rows if row["check"] == "degradation"}
    panels = [axes for line in lines for axes in line]
    for axes, (kind, title) in zip(panels, _PANELS.items(), strict=False):
        _title(axes, title)
        if kind in spoilt:
            _distances(axes, spoilt[kind], spoilt[kind]["amounts"], spoilt[kind]["unit"])
    _captions(panels[4], [row for row in rows if row["check"] == "captions"])
    _checkpoints(panels[5], [row for row in rows if row["check"] == "checkpoints"])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return save(figure, path)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", fontsize=11.5)


def _distances(axes: Any, row: Row, x: Sequence[float], unit: str) -> None:
    """Every curve as a share of its largest value: their units differ."""
    for (what, name), (label, colour, line, marker) in _CURVES.items():
        if what in row:
            values = row[what][name]
            axes.plot(x, [v / max(values) for v in values], line, color=colour, marker=marker, ms=4.5, label=label)
    axes.set_xlabel(unit)
    axes.set_ylabel("distance / its largest")
    axes.grid(axis="y")


def _captions(axes: Any, rows: Sequence[Row]) -> None:
    _title(axes, "Wrong captions")
    for row in rows:
        colour, marker = _WORDS[row["attribute"]]
        shares = [100 * share for share in row["shares"]]
        axes.plot(shares, row["score"], color=colour, marker=marker, ms=4.5, label=row["attribute"])
    axes.set_xlabel("captions with that word wrong, %")
    axes.set_ylabel("text score of clips")
    axes.grid(axis="y")
    if rows:
        axes.legend(frameon=False, fontsize=9)


def _checkpoints(axes: Any, rows: Sequence[Row]) -> None:
    _title(axes, "Snapshots of one training run")
    if not rows:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    steps = rows[-1]["steps"]
    _distances(axes, rows[-1], steps, "training steps")
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
