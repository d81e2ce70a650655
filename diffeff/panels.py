"""Pictures for the eye: clips beside each other with labels, and a contact sheet of all their frames."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from diffeff.media import Clip, enlarge

__all__ = ["contact_sheet", "difference", "side_by_side"]

_INK, _FAINT, _PAPER = (24, 26, 31), (110, 114, 122), (250, 250, 248)
_MARGIN, _GAP = 12, 4
_TITLE, _STRONG, _SMALL = 17, 15, 13


def difference(one: Clip, other: Clip, gain: int = 4) -> Clip:
    """Absolute difference of two clips of one shape, times `gain` so that small errors show."""
    gap = np.abs(one.astype(np.int16) - other.astype(np.int16)) * gain
    return gap.clip(0, 255).astype(np.uint8)


def side_by_side(clips: Mapping[str, Clip], smallest: int = 256) -> Clip:
    """Clips of one shape next to each other, each under its label, enlarged to at least `smallest` pixels."""
    shown = [enlarge(clip, _factor(clip, smallest)) for clip in clips.values()]
    frames, height, width, _ = shown[0].shape
    size = max(14, height // 16)
    band = 2 * size
    lefts = [_MARGIN + i * (width + _MARGIN) for i in range(len(shown))]
    page = _Page(lefts[-1] + width + _MARGIN, band + height + _MARGIN)
    for left, label in zip(lefts, clips, strict=True):
        page.text(left, band // 2, label, size, limit=width)
    sheet = np.repeat(page.pixels[None], frames, axis=0)
    for left, clip in zip(lefts, shown, strict=True):
        sheet[:, band : band + height, left : left + width] = clip
    return sheet


def contact_sheet(rows: Mapping[str, Clip], title: str = "", smallest: int = 128, columns: int = 10) -> Clip:
    """One still: a row of frames per clip, row labels at the left, frame numbers on top, `title` above all.

    The first line of a label is strong. Clips longer than `columns` frames show that many, evenly spread, first and
    last among them.
    """
    first = next(iter(rows.values()))
    factor, picked = _factor(first, smallest), _spread(len(first), columns)
    height, width = first.shape[1] * factor, first.shape[2] * factor
    title = textwrap.shorten(title, 140, placeholder=" ...")
    side = _MARGIN + max(_extent(line, _STRONG) for label in rows for line in label.split("\n"))
    head = _MARGIN + (34 if title else 0) + (22 if len(first) > 1 else 0)
    lefts = [side + i * (width + _GAP) for i in range(len(picked))]
    page = _Page(max(lefts[-1] + width + _MARGIN, _extent(title, _TITLE)), head + len(rows) * (height + _MARGIN))
    page.text(_MARGIN, 24, title, _TITLE)
    if len(first) > 1:
        for left, number in zip(lefts, picked, strict=True):
            page.text(left + width // 2, head - 14, str(number + 1), _SMALL, "mm", ink=_FAINT)
    for i, (label, clip) in enumerate(rows.items()):
        top = head + i * (height + _MARGIN)
        page.label(top + height // 2, label)
        page.paste(top, zip(lefts, enlarge(clip[picked], factor), strict=True))
    return page.pixels[None]


class _Page:
    """A sheet of paper to write and paste on."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width, height), _PAPER)
        self._pen = ImageDraw.Draw(self._image)

    @property
    def pixels(self) -> Clip:
        return np.array(self._image)

    def paste(self, top: int, pictures: Iterable[tuple[int, Clip]]) -> None:
        from PIL import Image

        for left, picture in pictures:
            self._image.paste(Image.fromarray(picture), (left, top))

    def label(self, middle: int, text: str) -> None:
        """The label of a row: its first line strong, the others faint under it."""
        lines = text.split("\n")
        for i, line in enumerate(lines):
            y = middle + round((i - (len(lines) - 1) / 2) * 21)
            self.text(_MARGIN, y, line, _SMALL if i else _STRONG, ink=_FAINT if i else _INK)

    def text(
        self,
        x: int,
        y: int,
        text: str,
        size: int,
        anchor: Literal["lm", "mm"] = "lm",
        limit: int | None = None,
        ink: tuple[int, int, int] = _INK,
    ) -> None:
        """Draw `text`, made smaller until it fits into `limit` pixels."""
        while limit is not None and size > 9 and _font(size).getlength(text) > limit:
            size -= 1
        self._pen.text((x, y), text, fill=ink, font=_font(size), anchor=anchor)


def _factor(clip: Clip, smallest: int) -> int:
    shorter = int(min(clip.shape[1:3]))
    return max(1, -(-smallest // shorter))


def _spread(count: int, columns: int) -> list[int]:
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, min(count, columns))})


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _extent(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 2 * _MARGIN
