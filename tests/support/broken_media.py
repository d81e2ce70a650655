"""Folders of images and videos, whole and broken, for tests of what a user may point an evaluation at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffeff import media

__all__ = [
    "bad_checksum_png",
    "can_be_denied",
    "corrupt_png",
    "empty_folder",
    "empty_png",
    "folder_of_clips",
    "folder_of_stills",
    "html_named_png",
    "mixed_sizes_folder",
    "noise",
    "read_only_folder",
    "truncated_apng",
    "truncated_mp4",
    "truncated_png",
    "truncated_streaming_mp4",
    "unreadable_folder",
]


def noise(frames: int = 1, height: int = 32, width: int = 32, seed: int = 0) -> media.Clip:
    """Random pixels, uint8 [frames, height, width, 3]: no two seeds, and no two frames, are alike."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def folder_of_stills(folder: Path, count: int = 4, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """`000.png`, `001.png`, ...: whole stills."""
    for i in range(count):
        media.write_lossless(folder / f"{i:03}.png", noise(1, *size, seed=seed + i))
    return folder


def folder_of_clips(
    folder: Path, count: int = 4, frames: int = 5, size: tuple[int, int] = (32, 32), suffix: str = ".png", seed: int = 0
) -> Path:
    """`000.png`, ... (animated, lossless), or `.mp4`: whole clips."""
    for i in range(count):
        clip = noise(frames, *size, seed=seed + i)
        path = folder / f"{i:03}{suffix}"
        media.write_lossless(path, clip) if suffix == ".png" else media.write(path, clip)
    return folder


def empty_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def mixed_sizes_folder(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32), (32, 32), (48, 64))) -> Path:
    """One still of each (height, width)."""
    for i, size in enumerate(sizes):
        media.write_lossless(folder / f"{i:03}.png", noise(1, *size, seed=i))
    return folder


def empty_png(path: Path) -> Path:
    """No byte at all, as a full disk leaves it."""
    return _bytes(path, b"")


def html_named_png(path: Path) -> Path:
    """An error page that was downloaded in place of the picture."""
    return _bytes(path, b"<!doctype html><title>404</title>")


def truncated_png(path: Path) -> Path:
    """A still whose second half is missing."""
    return _cut(media.write_lossless(path, noise(1, 64, 64)), 0.5)


def corrupt_png(path: Path) -> Path:
    """A still with its size intact and a run of pixel data overwritten."""
    data = bytearray(media.write_lossless(path, noise(1, 64, 64)).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    return _bytes(path, bytes(data))


def bad_checksum_png(path: Path) -> Path:
    """A still with a wrong checksum in its header chunk."""
    data = bytearray(media.write_lossless(path, noise(1, 64, 64)).read_bytes())
    data[29] ^= 0xFF  # the first byte of the header's CRC
    return _bytes(path, bytes(data))


def truncated_apng(path: Path, frames: int = 5) -> Path:
    """An animated png that ends within a later frame: a careless reader takes it for a shorter clip."""
    return _cut(media.write_lossless(path, noise(frames, 64, 64)), 0.7)


def truncated_mp4(path: Path, frames: int = 12) -> Path:
    """An mp4 whose end, with the index, is missing, as a killed encoder leaves it."""
    return _cut(media.write(path, noise(frames, 64, 64)), 0.6)


def truncated_streaming_mp4(path: Path, frames: int = 12, keep: float = 0.6) -> Path:
    """An mp4 with its index in front, cut off as a broken download is: a careless reader sees a shorter clip."""
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for image in noise(frames, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return _cut(path, keep)


def read_only_folder(folder: Path) -> Path:
    """A folder into which nothing can be written. See `can_be_denied`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o555)
    return folder


def unreadable_folder(folder: Path) -> Path:
    """A folder that cannot be listed. See `can_be_denied`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o000)
    return folder


def can_be_denied() -> bool:
    """Whether permissions stop this user: not root, nor anybody on Windows. Else use a file where a folder is due."""
    return os.name == "posix" and os.geteuid() != 0


def _cut(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    return _bytes(path, data[: int(len(data) * keep)])


def _bytes(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
