"""Pictures and clips as data URIs, so that a page is one file: as they are where small, reduced copies otherwise."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffeff.errors import DiffEffError
from diffeff.eval.render.markup import Markup, element

__all__ = ["LIMIT", "Inlined", "inline", "shown"]

LIMIT = 800_000
"""Bytes up to which a file goes into a page as it is."""

_TYPES = {
    ".png": "image/png",
    ".apng": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}
_SIDE, _FRAMES, _SMALL = 384, 48, 160


@dataclass(frozen=True)
class Inlined:
    """A file for a page: its data URI, whether it is a video, and whether its pixels are few enough to show them."""

    uri: str
    video: bool
    tiny: bool
    note: str = ""


def inline(path: Path, limit: int = LIMIT) -> Inlined | None:
    """The file as a data URI; None when it is gone or cannot be read. A large one, or one that browsers do not show, is
    reduced to an animated WebP of at most 384 pixels and 48 frames."""
    kind = _TYPES.get(path.suffix.lower())
    try:
        if kind is None or path.stat().st_size > limit:
            return _reduced(path)
        data = path.read_bytes()
        return Inlined(_uri(kind, data), kind.startswith("video"), _tiny(kind, data))
    except (OSError, ValueError, DiffEffError):
        return None


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _tiny(kind: str, data: bytes) -> bool:
    """Whether a picture is so small that enlarging must not blur it."""
    if kind.startswith("video"):
        return False
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return max(image.size) <= _SMALL


def _reduced(path: Path) -> Inlined:
    from PIL import Image

    from diffeff.media import read

    clip = read(path)
    step = -(-len(clip) // _FRAMES)
    images = [Image.fromarray(frame) for frame in clip[::step]]
    for image in images:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    memory = io.BytesIO()
    animated: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": 125 * step, "loop": 0}
    images[0].save(memory, format="WEBP", quality=85, **(animated if len(images) > 1 else {}))
    return Inlined(_uri("image/webp", memory.getvalue()), False, False, "reduced for this page")


def shown(found: Inlined, words: str) -> Markup:
    """The element that shows it; `words` say what it is to those who do not see it."""
    style = "tiny" if found.tiny else None
    if found.video:
        return element("video", src=found.uri, aria_label=words, loop=True, muted=True, playsinline=True, controls=True)
    return element("img", src=found.uri, alt=words, class_=style)
