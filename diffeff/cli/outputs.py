"""The files of `diffeff generate --compare` beside its output, and the summary that ends it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.markup import escape

from diffeff.cli.console import err
from diffeff.files import write_text
from diffeff.media import Clip, enlarge, to_bytes, write
from diffeff.panels import contact_sheet, difference, side_by_side

if TYPE_CHECKING:
    from diffeff.eval.compare import Arm, Comparison

__all__ = ["Files", "summary", "words"]


class Files:
    """Writes all of one comparison next to `output` and remembers where. Each file is whole or absent.

    As a context, it names the files that are there when the comparison is interrupted.
    """

    def __init__(self, output: Path, fps: int, factor: int) -> None:
        self.output, self.fps, self.factor = output, fps, factor
        self.written: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt and self.written:
            err().print("Written so far: " + escape(", ".join(self.written.values())))

    def beside(self, what: str, suffix: str | None = None) -> Path:
        return self.output.with_name(f"{self.output.stem}.{what}{suffix or self.output.suffix}")

    def arm(self, name: str, frames: Any) -> None:
        """The clip of one arm: the accelerated one is the output itself."""
        place = self.output if name == "accelerated" else self.beside(name)
        self._keep(name, write(place, enlarge(to_bytes(frames), self.factor), self.fps))

    def comparison(self, result: Comparison, title: str, settings: Mapping[str, Any]) -> None:
        """Side by side, contact sheet, and the report as JSON and Markdown."""
        clips = {_label(arm): to_bytes(arm.frames) for arm in result.arms}
        self._keep("side_by_side", write(self.beside("side-by-side"), side_by_side(clips), self.fps))
        self._keep("contact_sheet", write(self.beside("sheet", ".png"), contact_sheet(_rows(result), title)))
        record = json.dumps({**settings, "comparison": result.to_dict()}, indent=2) + "\n"
        self._keep("report_json", write_text(self.beside("report", ".json"), record))
        self._keep(
            "report_markdown",
            write_text(self.beside("report", ".md"), f"# {title}\n\n{result.to_markdown()}"),
        )

    def _keep(self, name: str, path: Path) -> None:
        self.written[name] = str(path)


def summary(result: Comparison, files: Mapping[str, str]) -> list[str]:
    """What came out, in a few lines of rich markup."""
    fast, plain = result.accelerated, result.plain
    lines = [
        f"[bold]{fast.speedup.median:.2f}x[/] against plain ({fast.speedup.low:.2f} to {fast.speedup.high:.2f} "
        f"over {result.rounds} rounds): {plain.seconds.median:.2f} s -> {fast.seconds.median:.2f} s",
        f"fidelity to plain: {_fidelity(fast)}",
    ]
    if result.fewer is not None:
        lines.append(f"plain with {result.fewer.steps} steps, about the same cost: {_fidelity(result.fewer)}")
    lines += [f"adherence, {arm.name}: {words(arm.adherence)}" for arm in result.arms if arm.adherence is not None]
    lines += [f"{outcome.method}: {escape(outcome.reason)}" for outcome in result.report.methods]
    lines += [f"[dim]note: {escape(note)}[/]" for note in result.notes]
    return lines + [f"{name.replace('_', ' '):>15}  [bold]{escape(path)}[/]" for name, path in files.items()]


def words(seen: Mapping[str, bool] | None) -> str:
    """Adherence in words."""
    if seen is None:
        return "not measurable (it needs a bundled sprites model and a caption of its world)"
    return ", ".join(f"{name} {'right' if ok else '[red]wrong[/]'}" for name, ok in seen.items())


def _fidelity(arm: Arm) -> str:
    if arm.max_abs == 0:
        return "bit-identical"
    return f"PSNR {arm.psnr:.1f} dB, largest difference of a pixel {arm.max_abs:.3f}"


def _label(arm: Arm) -> str:
    name = "plain" if arm.name == "fewer" else arm.name
    return f"{name}, {arm.steps} steps, {arm.seconds.median:.2f} s"


def _rows(result: Comparison) -> dict[str, Clip]:
    plain, fast = to_bytes(result.plain.frames), to_bytes(result.accelerated.frames)
    gain = _gain(difference(plain, fast, 1))  # one gain for all rows, so that they can be compared
    rows = {}
    for arm in result.arms:
        rows[f"{_label(arm)}\n{_speed(arm)}"] = to_bytes(arm.frames)
        if arm.name != "plain":
            label = f"|difference| x {gain}\n{arm.steps} steps: {_decibels(arm)}"
            rows[label] = difference(plain, to_bytes(arm.frames), gain)
    return rows


def _gain(gap: Clip) -> int:
    """The power of two that makes the largest error bright, 32 at most: beyond that it would show rounding."""
    room = 255 // max(int(gap.max()), 1)
    return min(32, 1 << (room.bit_length() - 1))


def _speed(arm: Arm) -> str:
    return "the reference" if arm.name == "plain" else f"{arm.speedup.median:.2f}x"


def _decibels(arm: Arm) -> str:
    return f"PSNR {arm.psnr:.1f} dB" if math.isfinite(arm.psnr) else "identical"
