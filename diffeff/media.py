"""Clips on disk: mp4, gif and png. A clip is uint8 `[frames, height, width, 3]`; a still has one frame.

A file is written beside its place and moved in when it is whole: an interrupted run leaves no broken file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import OutputError, nearest
from diffeff.files import replacing

__all__ = ["SUFFIXES", "Clip", "check_target", "enlarge", "frames_of", "read", "to_bytes", "write"]

Clip = NDArray[np.uint8]

SUFFIXES = (".mp4", ".gif", ".png")
"""What `write` can make. A clip of several frames in a .png is laid out in one row."""


def frames_of(output: Any) -> NDArray[np.float32]:
    """First clip or image of a pipeline's output (`output_type="np"`), float32 `[frames, height, width, 3]`.

    Not-a-number pixels stay what they are, so that a caller can tell a broken result from a dark one.
    """
    found = output.frames if hasattr(output, "frames") else output.images
    array = np.asarray(found[0], dtype=np.float32)
    return array if array.ndim == 4 else array[None]


def to_bytes(frames: NDArray[np.floating[Any]]) -> Clip:
    """Values in [0, 1] as uint8, rounded; not-a-number becomes black."""
    pixels: Clip = (np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def enlarge(clip: Clip, factor: int) -> Clip:
    """The clip with every pixel repeated `factor` times: tiny clips stay sharp when viewed."""
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def check_target(path: Path) -> None:
    """Raise OutputError before any work is done if `write` could not write there."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"cannot write {path}: {path.suffix or 'no suffix'} is not known. {nearest('', SUFFIXES)}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: a folder of that name is there. Choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # the only honest test of a folder is to write into it
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Choose another place.") from error


def write(path: Path, clip: Clip, fps: int = 8) -> Path:
    """Write a clip; the suffix chooses the format.

    mp4 is H.264 with 4:2:0 colour, which every player and browser shows; an odd width or height is padded by
    one repeated row or column. gif loops. png is lossless: a still, or a row of all frames.
    Raises OutputError for a place that cannot be written and for an unknown suffix.
    """
    writers: dict[str, Callable[[Path, Clip, int], None]] = {
        ".mp4": _write_mp4,
        ".gif": _write_gif,
        ".png": _write_png,
    }
    if path.suffix.lower() not in writers:
        raise OutputError(f"cannot write {path}: {path.suffix or 'no suffix'} is not known. {nearest('', SUFFIXES)}")
    with replacing(path) as temporary:
        writers[path.suffix.lower()](temporary, clip, fps)
    return path


def _write_mp4(path: Path, clip: Clip, fps: int) -> None:
    import av

    even = np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        stream.time_base = Fraction(1, fps)
        for image in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))


def _write_gif(path: Path, clip: Clip, fps: int) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(image) for image in clip]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _write_png(path: Path, clip: Clip, fps: int) -> None:
    from PIL import Image

    Image.fromarray(np.concatenate(list(clip), axis=1)).save(path, format="PNG")


def read(path: Path) -> Clip:
    """Read an mp4, gif or png back as a clip. Raises FileNotFoundError; mp4 is lossy."""
    if path.suffix.lower() == ".mp4":
        import av

        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
