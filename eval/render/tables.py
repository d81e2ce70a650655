"""Markdown tables of recorded rows, so that a document never holds a typed-in number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffeff.eval.render.advice import verdict
from diffeff.eval.render.markup import Markup
from diffeff.eval.render.records import Adherence, Cell, Row, Spread

__all__ = [
    "bench_table",
    "failures_table",
    "features_tables",
    "markdown",
    "matrix_grid",
    "matrix_notes",
    "matrix_table",
    "mebibytes",
    "overhead_table",
    "percent",
    "psnr_text",
    "scaling_table",
    "spread_text",
    "status_word",
]

DASH = "\u2013"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars, tags and line breaks in a cell are made harmless, unless it is Markup."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_safe(cell) for cell in line) + " |" for line in lines)


def _safe(cell: str) -> str:
    if isinstance(cell, Markup):
        return cell
    return " ".join(cell.replace("|", "\\|").replace("<", "&lt;").split())


def spread_text(spread: Spread | None, digits: int = 2) -> str:
    """`1.65 (1.60 to 1.69)`."""
    if spread is None:
        return DASH
    return f"{spread.value:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def psnr_text(cell: Cell) -> str:
    """Mean with its interval, and the worst clip: `43.6 dB [42.9, 44.2], worst 34.2`."""
    if cell.psnr is None:
        return DASH
    if math.isinf(cell.psnr.value):
        return "identical"
    interval = f" [{cell.psnr.low:.1f}, {cell.psnr.high:.1f}]" if cell.psnr.high > cell.psnr.low else ""
    worst = "" if cell.worst is None else f", worst {cell.worst:.1f}"
    return f"{cell.psnr.value:.1f} dB{interval}{worst}"


def percent(share: float | None) -> str:
    """A share as `57 %`."""
    return DASH if share is None else f"{100 * share:.0f} %"


def mebibytes(size: float | None) -> str:
    """Bytes as MiB."""
    return DASH if size is None else f"{size / 2**20:,.0f} MiB"


def adherence_text(entry: Adherence | None) -> str:
    """`96 % [87, 99]`."""
    if entry is None:
        return DASH
    return f"{100 * entry.share.value:.0f} % [{100 * entry.share.low:.0f}, {100 * entry.share.high:.0f}]"


def bench_table(
    cells: Sequence[Cell],
    among: Sequence[Cell] | None = None,
    *,
    short: bool = False,
    named: Callable[[Cell], str] = lambda cell: cell.label,
) -> str:
    """The arms of a run that ran: speed, fidelity, work left, memory, adherence, and how each stands to fewer steps.

    `among` are all cells of the run where `cells` are some of them. Columns without any number are left out, and with
    `short` those that only a closer look needs. `named` makes the first cell of a row.
    """
    ran = [cell for cell in cells if not cell.hopeless]
    columns: dict[str, list[str]] = {
        "arm": [named(cell) for cell in ran],
        "speed-up (quartiles)": [spread_text(cell.speed) for cell in ran],
        "CPU-time speed-up": [DASH if c.cpu_speed is None else f"{c.cpu_speed.value:.2f}" for c in ran],
        "PSNR to plain": [psnr_text(cell) for cell in ran],
        "FLOPs left": [percent(cell.flops) for cell in ran],
        "peak memory": [mebibytes(cell.peak_bytes) for cell in ran],
        "shows its caption": [_follows(cell.adherence) for cell in ran],
        "against fewer steps at its speed": [_standing(cell, among or cells) for cell in ran],
    }
    dropped = {"CPU-time speed-up", "peak memory"} if short else set()
    kept = {name: values for name, values in columns.items() if set(values) != {DASH} and name not in dropped}
    return markdown(list(kept), zip(*kept.values(), strict=True))


def _follows(adherence: Mapping[str, Adherence]) -> str:
    """`96 % [86, 99]: colour 100, shape 98`: the whole caption, then its attributes where they differ."""
    shares = {name: f"{100 * entry.share.value:.0f}" for name, entry in adherence.items()}
    singles = ", ".join(f"{name} {share}" for name, share in shares.items() if name != "all")
    whole = adherence_text(adherence.get("all"))
    return whole if len(set(shares.values())) < 2 else f"{whole}: {singles}"


def _standing(cell: Cell, cells: Sequence[Cell]) -> str:
    if cell.state == "idle":
        return "does nothing here"
    if cell.is_plain or cell.kind == "fewer-steps":
        return DASH
    found = verdict(cell, cells)
    return found.words if found.expected is None else f"{found.words} ({found.expected:.1f} dB)"


def failures_table(cells: Sequence[Cell], named: Callable[[Cell], str] = lambda cell: cell.label) -> str:
    """The arms that were refused or failed, each with its own words; empty when none was."""
    rows = [
        [named(cell), cell.state + (f" ({cell.phase})" if cell.phase else ""), cell.message]
        for cell in cells
        if cell.hopeless
    ]
    return markdown(["arm", "what happened", "its own words"], rows) if rows else ""


def matrix_grid(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Methods, families, and the newest row of each pair."""
    pairs = {(str(row["method"]), str(row["family"])): row for row in rows}
    return list(dict.fromkeys(m for m, _ in pairs)), list(dict.fromkeys(f for _, f in pairs)), pairs


def matrix_table(rows: Sequence[Row]) -> str:
    """Methods by families: works with the share of the work left, refused, no effect, or fails."""
    methods, families, pairs = matrix_grid(rows)
    body = [[f"`{method}`", *(_matrix_cell(pairs.get((method, family))) for family in families)] for method in methods]
    return markdown(["method", *families], body)


def _matrix_cell(row: Row | None) -> str:
    if row is None:
        return DASH
    left = row.get("compute_left")
    word = "**fails**" if row["status"] == "fails" else status_word(str(row["status"]))
    return f"{word}, {percent(left)} left" if row["status"] == "works" and left is not None else word


def matrix_notes(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(method, what happened, reason) of every pair that does not work; families of one reason are put together."""
    _, everything, pairs = matrix_grid(rows)
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for (method, family), row in pairs.items():
        if row["status"] != "works":
            grouped.setdefault((method, str(row["status"]), str(row.get("reason") or "")), []).append(family)
    return [
        (method, f"{status_word(status)}: {_families(found, everything)}", reason)
        for (method, status, reason), found in grouped.items()
    ]


def _families(found: Sequence[str], everything: Sequence[str]) -> str:
    return "every family" if len(found) == len(everything) > 1 else ", ".join(found)


def status_word(status: str) -> str:
    """What a status of the matrix is called."""
    return "no effect" if status == "idle" else status


def scaling_table(rows: Sequence[Row]) -> str:
    """Exponents of time and memory per model and axis: doubling x multiplies the time by 2 to that power."""
    body = [
        [
            str(row["model"]) + (" with plan" if row.get("plan") else ""),
            str(row["axis"]),
            _range(row["points"]),
            _slope(row.get("slope_time")),
            _slope(row.get("slope_memory")),
        ]
        for row in rows
    ]
    return markdown(["model", "axis", "measured at", "time grows as x^", "memory above load grows as x^"], body)


def _range(points: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{point['x']:g}" for point in points)


def _slope(slope: Mapping[str, Any] | None) -> str:
    if not slope or slope.get("value") is None:
        return DASH
    interval = "" if slope.get("low") is None else f" [{slope['low']:.2f}, {slope['high']:.2f}]"
    return f"{slope['value']:.2f}{interval}"


def overhead_table(rows: Sequence[Row]) -> str:
    """What an attached plan that does nothing costs."""
    body = [
        [
            str(row["model"]),
            f"{row['ratio_median']:.3f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['seams_us_per_step']:.0f} µs of {row['plain_step_ms']:.0f} ms",
        ]
        for row in rows
    ]
    return markdown(["model", "time attached / plain (range)", "seams' own cost per step"], body)


def features_tables(rows: Sequence[Row]) -> list[str]:
    """What `features_check` found: distances of spoilt clips, scores of wrong captions, snapshots of a training run."""
    made = []
    for check, head, line in _CHECKS:
        body = [line(row) for row in rows if row.get("check") == check]
        made += [markdown(head, body)] if body else []
    return made


def _degradation(row: Row) -> list[str]:
    rises = [rise for found in row["rises"].values() for rise in found.values()]
    curves = [_arrow(row[what]["frechet"]) if what in row else DASH for what in ("clips", "frames")]
    met = "yes" if row.get("trained_on", True) else "no"
    return [
        str(row["kind"]),
        f"{row['unit']}: {_listed(row['amounts'])}",
        *curves,
        f"{sum(rises)} of {len(rises)}",
        met,
    ]


def _captions(row: Row) -> list[str]:
    falls = "yes" if row["falls"] else "no"
    return [str(row["attribute"]), _arrow(row["score"]), falls, percent(row.get("separated")), str(row["n"])]


def _checkpoints(row: Row) -> list[str]:
    order = [name for what in ("clips", "frames") for name, good in (row["in_order"].get(what) or {}).items() if good]
    distances = [_arrow(row[what]["frechet"]) if what in row else DASH for what in ("clips", "frames")]
    return [str(row["model"]), _listed(row["steps"]), *distances, _arrow(row["score"]), str(len(order))]


_CHECKS: tuple[tuple[str, list[str], Callable[[Row], list[str]]], ...] = (
    (
        "degradation",
        [
            "spoilt by",
            "amounts",
            "Fréchet distance, clips",
            "Fréchet distance, frames",
            "curves that rise",
            "met in training",
        ],
        _degradation,
    ),
    ("captions", ["wrong word", "score, none to all captions wrong", "falls", "own caption wins", "clips"], _captions),
    (
        "checkpoints",
        [
            "model",
            "training steps",
            "Fréchet distance, clips",
            "Fréchet distance, frames",
            "text score",
            "distances in order",
        ],
        _checkpoints,
    ),
)


def _arrow(values: Sequence[float]) -> str:
    return " → ".join(f"{value:.3g}" for value in values)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
