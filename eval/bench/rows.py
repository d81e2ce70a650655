"""The rows of a bench: one JSON line per arm, with everything that is needed to run it again and to render it."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import OutputError
from diffeff.eval.metrics.result import bootstrap_mean
from diffeff.files import write_text
from diffeff.media import Clip
from diffeff.zoo.score import Accuracy

__all__ = ["adherence_of", "append", "check_appendable", "commit", "fidelity_of", "quartiles", "ratios", "strip"]

_STRIP_BYTES = 24_000
_QUALITIES = (None, 95, 90, 85)
"""Of WebP, best first; None is lossless."""


def quartiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles; None without values."""
    if not values:
        return None
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return {"median": _round(middle), "q1": _round(low), "q3": _round(high)}


def ratios(plain: Sequence[float], arm: Sequence[float]) -> list[float]:
    """How many times faster than plain, prompt by prompt. Raises ValueError for lists of different lengths."""
    return [a / b for a, b in zip(plain, arm, strict=True)]


def fidelity_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean with a 95 % bootstrap interval over prompts, and the extremes. Infinite PSNRs are counted in `identical`.

    An entry holds the numbers of one prompt: `psnr` (None when infinite), `ssim`, `mae`, `identical`.
    """
    found: dict[str, Any] = {name: _summary(entries, name) for name in ("psnr", "ssim", "mae")}
    return found | {"identical": sum(bool(entry["identical"]) for entry in entries)}


def _summary(entries: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    values = np.array([entry[name] for entry in entries if entry[name] is not None], dtype=np.float64)
    if not len(values):
        return None
    mean, low, high = float(values.mean()), None, None
    if len(values) > 1:
        interval = bootstrap_mean(values)
        low, high = interval.low, interval.high
    numbers = {"mean": mean, "low": low, "high": high, "min": float(values.min()), "max": float(values.max())}
    return {key: _round(value) for key, value in numbers.items() if value is not None}


def adherence_of(entries: Sequence[Mapping[str, bool] | None]) -> dict[str, Any] | None:
    """Per attribute how many clips show it, with its Wilson interval; `all` counts the clips that show everything."""
    seen = [entry for entry in entries if entry is not None]
    if not seen or len(seen) < len(entries):
        return None
    rows = [dict(entry) | {"all": all(entry.values())} for entry in seen]
    names = dict.fromkeys(name for row in rows for name in row)
    counts = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: _accuracy(Accuracy(sum(found), len(found))) for name, found in counts.items()}


def _accuracy(found: Accuracy) -> dict[str, Any]:
    return {
        "right": found.right,
        "trials": found.trials,
        "accuracy": round(found.accuracy, 4),
        "interval95": [round(x, 4) for x in found.interval],
    }


def _round(value: float, digits: int = 5) -> float:
    """To so many significant digits: more would say nothing."""
    return (
        value
        if value == 0 or not math.isfinite(value)
        else round(value, digits - 1 - math.floor(math.log10(abs(value))))
    )


# --- pictures -------------------------------------------------------------------------------------------------------
def strip(clip: Clip, height: int = 96) -> str:
    """The frames of a clip [F, H, W, 3] in one row, as a base64 picture of at most 24 kB: a lossless WebP, a lossy one
    where that is too large, then fewer and smaller frames."""
    count = len(clip)
    while True:
        picked = sorted({round(float(i)) for i in np.linspace(0, len(clip) - 1, count)})
        data = _smallest(np.concatenate([_small(clip[i], height) for i in picked], axis=1))
        if len(data) <= _STRIP_BYTES or (count == 1 and height <= 16):
            return base64.b64encode(data).decode("ascii")
        count, height = (count - 1, height) if count > 4 else (count, height * 3 // 4)


def _small(frame: NDArray[np.uint8], height: int) -> NDArray[np.uint8]:
    from PIL import Image

    if frame.shape[0] <= height:
        return frame
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def _smallest(picture: NDArray[np.uint8]) -> bytes:
    """The best quality that fits; the lowest that still shows what differs where none does."""
    data = b""
    for quality in _QUALITIES:
        data = _webp(picture, quality)
        if len(data) <= _STRIP_BYTES:
            break
    return data


def _webp(picture: NDArray[np.uint8], quality: int | None) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    Image.fromarray(picture).save(buffer, format="WEBP", method=6, **options)
    return buffer.getvalue()


# --- files ----------------------------------------------------------------------------------------------------------
def check_appendable(path: Path) -> None:
    """Raise OutputError before any work is done if `append` could not write there."""
    if path.is_dir():
        raise OutputError(f"cannot append to {path}: a folder of that name is there. Choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # the only honest test of a folder is to write into it
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Choose another place.") from error


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Add rows to a JSON-lines file, whole or not at all. Raises OutputError when it cannot be read or written."""
    try:
        before = path.read_text("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot append to {path}: {error}. Choose another file.") from error
    gap = "" if before.endswith("\n") or not before else "\n"
    return write_text(path, before + gap + "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


def commit() -> str | None:
    """`git describe --always --dirty` of the checkout this module lies in; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
