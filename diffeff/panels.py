"""Pictures for the eye: clips beside each other with labels, and a contact sheet of all their frames."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.media import Clip, enlarge

__all__ = ["contact_sheet", "difference", "side_by_side"]

_INK, _PAPER, _FAINT = (24, 26, 31), (250, 250, 248), (110, 114, 122)
_MARGIN = 12


def difference(one: Clip, other: Clip, gain: int = 4) -> Clip:
    """Absolute difference of two clips of one shape, times `gain` so that small errors show."""
    gap = np.abs(one.astype(np.int16) - other.astype(np.int16)) * gain
    return gap.clip(0, 255).astype(np.uint8)


def side_by_side(clips: Mapping[str, Clip], smallest: int = 256) -> Clip:
    """Clips of one shape next to each other, each under its label, enlarged until `smallest` pixels high."""
    shown = [enlarge(clip, _factor(clip, smallest)) for clip in clips.values()]
    frames, height, width, _ = shown[0].shape
    size = max(14, height // 16)
    band = 2 * size
    total = len(shown) * (width + _MARGIN) + _MARGIN
    labels = _canvas(band + height + _MARGIN, total)
    for i, label in enumerate(clips):
        labels = _text(labels, (_MARGIN + i * (width + _MARGIN), band // 2), label, size, "lm", width)
    sheet = np.repeat(labels[None], frames, axis=0)
    for i, clip in enumerate(shown):
        left = _MARGIN + i * (width + _MARGIN)
        sheet[:, band : band + height, left : left + width] = clip
    return sheet


def contact_sheet(clips: Mapping[str, Clip], title: str = "", smallest: int = 128, columns: int = 10) -> Clip:
    """One still: a row of frames per clip, row labels at the left, frame numbers on top, `title` above all.

    Clips longer than `columns` frames show that many, evenly spread, first and last among them.
    """
    rows = list(clips.values())
    count, height, width, _ = rows[0].shape
    factor = _factor(rows[0], smallest)
    picked = np.unique(np.linspace(0, count - 1, min(count, columns)).round().astype(int))
    cell_h, cell_w = height * factor, width * factor
    side, head = _label_width(clips), 34 + (34 if title else 0)
    title = textwrap.shorten(title, 140, placeholder=" ...")
    sheet = _canvas(
        head + len(rows) * (cell_h + _MARGIN),
        max(side + len(picked) * (cell_w + 4) + _MARGIN, _width(title, 17)),
    )
    sheet = _text(sheet, (_MARGIN, 26), title, 17, "lm")
    for i, (label, clip) in enumerate(clips.items()):
        top = head + i * (cell_h + _MARGIN)
        sheet = _label(sheet, top + cell_h // 2, label)
        for j, frame in enumerate(enlarge(clip[picked], factor)):
            left = side + j * (cell_w + 4)
            sheet[top : top + cell_h, left : left + cell_w] = frame
    if count > 1:
        for j, number in enumerate(picked):
            sheet = _text(
                sheet,
                (side + j * (cell_w + 4) + cell_w // 2, head - 14),
                str(number + 1),
                13,
                "mm",
                ink=_FAINT,
            )
    return sheet[None]


def _factor(clip: Clip, smallest: int) -> int:
    return max(1, -(-smallest // min(clip.shape[1:3])))


def _canvas(height: int, width: int) -> Clip:
    return np.full((height, width, 3), _PAPER, dtype=np.uint8)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _width(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 2 * _MARGIN


def _label_width(clips: Mapping[str, Any]) -> int:
    return max(_width(line, 15) for label in clips for line in label.split("\n")) + _MARGIN


def _label(sheet: Clip, middle: int, label: str) -> Clip:
    """A row label: its first line strong, the others faint under it."""
    lines = label.split("\n")
    for i, line in enumerate(lines):
        y = middle + round((i - (len(lines) - 1) / 2) * 21)
        sheet = _text(sheet, (_MARGIN, y), line, 15 if i == 0 else 13, "lm", ink=_INK if i == 0 else _FAINT)
    return sheet


def _text(
    sheet: Clip,
    where: tuple[int, int],
    text: str,
    size: int,
    anchor: str,
    limit: int | None = None,
    ink: tuple[int, int, int] = _INK,
) -> NDArray[np.uint8]:
    """The sheet with `text` drawn on it, made smaller until it fits into `limit` pixels."""
    from PIL import Image, ImageDraw

    while limit is not None and size > 9 and _font(size).getlength(text) > limit:
        size -= 1
    image = Image.fromarray(sheet)
    ImageDraw.Draw(image).text(where, text, fill=ink, font=_font(size), anchor=anchor)
    return np.array(image)
