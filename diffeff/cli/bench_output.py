"""What `diffeff bench` shows: rows as tables, and how far a run is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffeff.cli.console import emit, err, out, table

__all__ = ["bench_table", "finish", "kept", "kernels_table", "matrix_table", "progress", "scaling_table"]

Rows = list[dict[str, Any]]


def kept(rows: Iterable[dict[str, Any]], file: Path | None) -> Rows:
    """All the rows; each is in the file, if one was named, as soon as it is measured, so that stopping loses none."""
    from diffeff.eval.bench.rows import append

    found = []
    try:
        for row in rows:
            if file is not None:
                append(file, [row])
            found.append(row)
    except KeyboardInterrupt:
        if file is not None and found:
            err().print(f"What is finished is kept in {file}: {len(found)} rows.", markup=False)
        raise
    return found


def finish(rows: Rows, file: Path | None, json: bool, shown: Callable[[Rows], Table]) -> None:
    """Rows that are in the file, if one was named, on stdout as a table or as JSON."""
    if json:
        emit({"rows": rows})
    else:
        out().print(shown(rows))
        for row in rows:
            if row.get("error"):
                _explain(row)
        if file is not None:
            out().print(f"\n{len(rows)} rows appended to [bold]{escape(str(file))}[/]")


def _explain(row: dict[str, Any]) -> None:
    """Why an arm has no numbers, in its own words."""
    error, arm = row["error"], row["arm"]["label"]
    text = f"{error['type']}: {error['message']}"
    out().print(f"[red]{row['status']}[/] [bold]{escape(arm)}[/] ({error['phase']}): {escape(text)}")


def bench_table(rows: Rows) -> Table:
    """Arms of one bench."""
    shown = table("arm", "speed-up (quartiles)", "computed", "PSNR to plain", "SSIM", "adherence", "peak memory")
    for row in rows:
        shown.add_row(escape(row["arm"]["label"]), *_cells(row))
    return shown


def _cells(row: dict[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [f"[red]{row['status']}[/], see below"]
    speed, flops = row["speedup"], row["flops"]
    psnr, ssim = row["fidelity"]["psnr"], row["fidelity"]["ssim"]
    followed, peak = (row["adherence"] or {}).get("all"), row["peak_memory"]
    plain = row["arm"]["kind"] == "plain"
    return [
        f"{speed['median']:.2f}x ({speed['q1']:.2f} to {speed['q3']:.2f})",
        "-" if flops is None else f"{100 * flops:.0f} %",
        _decibels(psnr, plain, row["noop"]),
        "-" if ssim is None else f"{ssim['mean']:.4f}",
        "-" if followed is None else f"{followed['right']} of {followed['trials']}",
        "-" if peak is None else f"{peak['bytes'] / 2**20:.0f} MiB",
    ]


def _decibels(psnr: dict[str, float] | None, plain: bool, idle: bool) -> str:
    if psnr is None:
        return "reference" if plain else "[yellow]did nothing: identical[/]" if idle else "identical"
    return f"{psnr['mean']:.1f} dB (worst {psnr['min']:.1f})"


def matrix_table(rows: Rows) -> Table:
    """Cells of the matrix."""
    shown = table("family", "method", "status", "computed", "why")
    for row in rows:
        left = row["compute_left"]
        words = [row["family"], row["method"], row["status"], "-" if left is None else f"{100 * left:.0f} %"]
        shown.add_row(*words, escape(str(row["reason"] or "")))
    return shown


def kernels_table(rows: Rows) -> Table:
    """Arms of each kernel's cases."""
    shown = table("kernel", "shape", "way", "runs", "ms", "times baseline's speed", "of copy", "of matmul", "copies")
    for row in rows:
        words = [row["kernel"], row["shape"], row["arm"], row["path"]]
        shown.add_row(*words, *(_kernel_cells(row) if row["status"] == "ok" else [f"[red]{escape(row['reason'])}[/]"]))
    return shown


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    ratio = row["ratio"]
    times = "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
    shares = [f"{100 * row[name]:.0f} %" for name in ("of_copy", "of_matmul")]
    return [f"{row['milliseconds']['median']:.3f}", times, *shares, str(row["copies"])]


def scaling_table(rows: Rows) -> Table:
    """Slopes along each axis."""
    shown = table("model", "axis", "time grows with power", "memory grows with power")
    for row in rows:
        shown.add_row(row["model"], row["axis"], _slope(row["slope_time"]), _slope(row["slope_memory"]))
    return shown


def _slope(found: dict[str, float] | None) -> str:
    if not found or found.get("value") is None:
        return "-"
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Shows what is being run and how long the rest will take: a bar on a terminal, a line a minute in a log file."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task, lines = bar.add_task("load the model", total=None), _Lines()

        def observe(done: int, total: int, what: str) -> None:
            bar.update(task, description=escape(what), completed=done, total=total)
            if hidden and not quiet:
                lines.say(done, total, what)

        yield observe


class _Lines:
    """Progress for a log file, at most one line per `every` seconds."""

    def __init__(self, every: float = 60.0) -> None:
        self.every, self.start, self.last = every, time.monotonic(), time.monotonic()

    def say(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self.last < self.every or not done:
            return
        self.last = now
        left = (now - self.start) / done * (total - done)
        err().print(f"{done} of {total} runs, about {left / 60:.0f} min left: {what}", markup=False)
