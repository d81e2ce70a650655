"""Clips on disk: videos, gif, webp and png. A clip is uint8 `[frames, height, width, 3]`; a still has one frame.

A file is written beside its place and moved in when it is whole: an interrupted run leaves no broken file.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import OutputError, nearest
from diffeff.files import replacing

__all__ = [
    "READABLE",
    "SUFFIXES",
    "VIDEOS",
    "Clip",
    "check_target",
    "enlarge",
    "frames_of",
    "read",
    "size_of",
    "to_bytes",
    "write",
    "write_lossless",
]

Clip = NDArray[np.uint8]

SUFFIXES = (".mp4", ".gif", ".png")
"""What `write` can make. A clip of several frames in a .png is laid out in one row."""

VIDEOS = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v")
READABLE = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", *VIDEOS)
"""What `read` understands. png, webp and gif may be animated."""


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


def write_lossless(path: Path, clip: Clip, fps: int = 8) -> Path:
    """Write a .png from which `read` gives back every frame bit for bit; several frames make an animated PNG.

    Every frame is stored whole: Pillow's own writer would merge equal neighbours into one. Browsers play it in a loop.
    Raises OutputError for a place that cannot be written and for another suffix.
    """
    if path.suffix.lower() != ".png":
        raise OutputError(f"cannot write {path}: lossless clips are .png. Choose a name that ends in .png.")
    if len(clip) == 1:
        return write(path, clip)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(_animated_png(clip, fps))
    return path


def _animated_png(clip: Clip, fps: int) -> Iterator[bytes]:
    """The chunks of an animated PNG (PNG specification, third edition): frame 0 in IDAT, the others in fdAT."""
    count, height, width = clip.shape[:3]
    yield b"\x89PNG\r\n\x1a\n"
    yield _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB
    yield _chunk(b"acTL", struct.pack(">II", count, 0))  # 0: loop for ever
    number = 0  # of the fcTL and fdAT chunks, together
    for place, image in enumerate(clip):
        yield _chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, fps, 0, 0))
        number += 1
        for data in _compressed(image):
            yield _chunk(b"IDAT", data) if place == 0 else _chunk(b"fdAT", struct.pack(">I", number) + data)
            number += place > 0
    yield _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _compressed(image: NDArray[np.uint8]) -> Iterator[bytes]:
    """The IDAT parts of the image as Pillow compresses it: its row filters beat plain zlib."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    data, at = buffer.getvalue(), 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            yield data[at + 8 : at + 8 + length]
        at += length + 12


def read(path: Path) -> Clip:
    """Read an image, an animation or a video as a clip; see READABLE. Alpha is dropped, EXIF rotation is not applied.

    Raises FileNotFoundError, and for a damaged or truncated file whatever its decoder raises (OSError, SyntaxError,
    ValueError, EOFError). A clip that is cut off is an error, never a shorter clip, where the format lets one see it.
    """
    return _read_video(path) if path.suffix.lower() in VIDEOS else _read_image(path)


def _read_video(path: Path) -> Clip:
    import av

    frames: list[NDArray[np.uint8]] = []
    packets, end = 0, 0.0
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError(f"it is damaged or cut off after {len(frames)} frames")
            if packet.size:
                packets += 1
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            decoded: Any = packet.decode()
            frames += [frame.to_ndarray(format="rgb24") for frame in decoded]
        if not frames:
            raise ValueError("it has no frame that can be decoded")
        if _cut_off(container, stream, packets, end):
            raise ValueError(f"it is cut off after {len(frames)} frames")
    return np.stack(frames)


def _cut_off(container: Any, stream: Any, packets: int, end: float) -> bool:
    """Whether the header promises more than came: frames in mp4, mov and avi; seconds in mkv and webm without sound.

    ffmpeg itself takes a file that ends between two frames for a whole one.
    """
    if "mp4" in container.format.name or container.format.name == "avi":
        return bool(packets < stream.frames)
    if "matroska" not in container.format.name or len(container.streams) > 1:
        return False
    if container.duration is None or not stream.average_rate:
        return False
    return bool(end + 0.9 / float(stream.average_rate) < container.duration / 1e6)  # given in microseconds


def _read_image(path: Path) -> Clip:
    from PIL import Image

    with Image.open(path) as image:
        # A photo in the MPO format holds further views of the same moment (a depth map, a smaller copy).
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        frames = []
        for place in range(count):  # by number: an iterator would take a cut-off file for a shorter one
            image.seek(place)
            frames.append(_rgb(image))
    return np.stack(frames)


def _rgb(image: Any) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        grey: NDArray[np.uint8] = (np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit ({image.mode}), of unknown range; save it with 8 bits")
    return np.asarray(image.convert("RGB"))


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the header: no pixel is decoded. Raises as `read` does."""
    if path.suffix.lower() in VIDEOS:
        import av

        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            context = container.streams.video[0].codec_context
            return context.height, context.width
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width
