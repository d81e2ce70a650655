"""The images and videos of a folder as items: named, sorted, with their prompts, read one at a time."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from diffeff import media
from diffeff.errors import DiffEffError
from diffeff.eval import records
from diffeff.files import sha256

__all__ = ["MANIFESTS", "Item", "ItemError", "ItemSet", "check_sizes", "item_sha", "open_folder", "read_item"]

MANIFESTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv", "prompts.csv")
"""Files that give items their prompts and seeds; the first one found counts. `metadata.*` is the layout of the
Hugging Face image-folder data sets (`file_name`, `text`)."""

FILE_COLUMNS = ("file_name", "file", "filename", "path", "image", "video", "name")


class ItemError(DiffEffError, ValueError):
    """A folder without usable items, or an item that cannot be read; names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video. `name` is its path below the folder without the suffix: it pairs subject and reference."""

    name: str
    path: Path
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ItemSet(Sequence[Item]):
    """The items of one folder in natural order of their names (`img2` before `img10`). No pixel is read.

    `ignored` counts by suffix the files that are neither images nor videos.
    """

    folder: Path
    items: tuple[Item, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)
    manifest: str | None = None

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> ItemSet: ...
    def __getitem__(self, index: int | slice) -> Item | ItemSet:
        return replace(self, items=self.items[index]) if isinstance(index, slice) else self.items[index]

    @property
    def by_name(self) -> dict[str, Item]:
        """Items by name, to pair two sets."""
        return {item.name: item for item in self.items}

    def with_prompts(self, prompts: Sequence[str]) -> ItemSet:
        """The same items with the i-th prompt at the i-th item.

        Raises ItemError when there are fewer prompts than items.
        """
        if len(prompts) < len(self):
            raise ItemError(
                f"{self.folder} holds {len(self)} items but there are only {len(prompts)} prompts. "
                "Give one prompt per item in the order of the file names, or put a metadata.jsonl into the folder."
            )
        pairs = zip(self.items, prompts, strict=False)
        return replace(self, items=tuple(replace(item, prompt=prompt) for item, prompt in pairs))

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for a report."""
        return {
            "folder": str(self.folder),
            "n": len(self),
            "manifest": self.manifest,
            "prompts": sum(item.prompt is not None for item in self.items),
            "ignored": dict(self.ignored),
        }


def open_folder(path: Path) -> ItemSet:
    """Every image and video below `path`, sub-folders included, hidden files and folders left out.

    A manifest (see MANIFESTS) beside them gives prompts and seeds. A last line of a .jsonl that was cut off by a
    killed run is left out.

    Raises ItemError: the folder is missing, empty, or holds nothing readable; two files would have the same name; the
    manifest is broken or names a file that is not there.
    """
    path = Path(path)
    found, ignored = _files(path)
    if not found:
        raise ItemError(_nothing(path, ignored))
    items = _named(path, found)
    manifest = next((path / name for name in MANIFESTS if (path / name).is_file()), None)
    if manifest is not None:
        items = _described(items, manifest)
    return ItemSet(path, tuple(items), ignored, None if manifest is None else manifest.name)


def _files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Readable files, and how many others there are of each suffix."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ItemError(f"{folder} {what}. Give a folder of images or videos.")
    found: list[Path] = []
    ignored: Counter[str] = Counter()
    for file in _walk(folder):
        if file.suffix.lower() in media.READABLE:
            found.append(file)
        elif file.name not in MANIFESTS:
            ignored[file.suffix.lower() or "no suffix"] += 1
    return found, dict(sorted(ignored.items()))


def _walk(folder: Path) -> Iterator[Path]:
    """All files below the folder but hidden ones. A folder that cannot be looked into is an error, not an empty one."""

    def refuse(error: OSError) -> None:
        raise ItemError(f"cannot look into {error.filename}: {error.strerror}. Check its permissions.") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _nothing(folder: Path, ignored: Mapping[str, int]) -> str:
    known = ", ".join(media.READABLE)
    if not ignored:
        return f"{folder} is empty. Give a folder with images or videos ({known})."
    others = ", ".join(f"{count} {suffix}" for suffix, count in ignored.items())
    return f"{folder} holds no image and no video, only {others}. Known: {known}."


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key: runs of digits count as numbers; equal numbers (`1`, `01`) fall back to their text."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def _named(folder: Path, files: Iterable[Path]) -> list[Item]:
    named: dict[str, Path] = {}
    for file in sorted(files):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in named:
            raise ItemError(
                f"{named[name]} and {file} would both be item {name!r}. Keep one, or put them in two folders."
            )
        named[name] = file
    return [Item(name, named[name]) for name in sorted(named, key=_natural)]


def _described(items: Sequence[Item], manifest: Path) -> list[Item]:
    """The items with the prompts and seeds that the manifest gives them."""
    folder = manifest.parent
    by_file = {item.path.relative_to(folder).as_posix(): item for item in items}
    by_name = {item.name: item for item in items}
    given: dict[str, Item] = {}
    for where, record in records.read(manifest, cut_off=True):
        file = records.text(record, FILE_COLUMNS, where)
        item = by_file.get(Path(file).as_posix()) or by_name.get(file)
        if item is None:
            raise ItemError(f"{where}: {file!r} is not in the folder. Remove the line or add the file.")
        prompt = records.optional_text(record, records.PROMPT_COLUMNS, where)
        given[item.name] = replace(item, prompt=prompt, seed=records.integer(record, "seed", where))
    return [given.get(item.name, item) for item in items]


def read_item(item: Item) -> media.Clip:
    """The pixels of an item, uint8 `[frames, height, width, 3]`; a still has one frame. Alpha is dropped.

    Raises ItemError that names the file when it is missing, damaged or cut off.
    """
    try:
        return media.read(item.path)
    except FileNotFoundError as error:
        raise ItemError(f"{item.path} is gone. Put it back, or evaluate the folder anew.") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, ValueError, struct.error
        raise ItemError(f"cannot read {item.path}: {_reason(error)}. Make the file anew or remove it.") from error


def _reason(error: Exception) -> str:
    words = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return "it is no image or the file is damaged" if words.startswith("cannot identify image file") else words


def item_sha(path: Path) -> str:
    """Hex sha256 of the file: what feature and metric stores know an item by. Raises ItemError."""
    try:
        return sha256(path)
    except OSError as error:
        raise ItemError(f"cannot read {path}: {error.strerror or error}. Make the file anew or remove it.") from error


def check_sizes(items: Iterable[Item]) -> tuple[int, int]:
    """The (height, width) that all items share, from the files' headers: nothing is decoded.

    Raises ItemError: sizes differ (names one file of each), a header cannot be read, or there are no items.
    """
    seen: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        seen.setdefault(_size(item), []).append(item)
    if not seen:
        raise ItemError("there are no items to take a size from")
    if len(seen) > 1:
        raise ItemError(_mixed(seen))
    return next(iter(seen))


def _size(item: Item) -> tuple[int, int]:
    try:
        return media.size_of(item.path)
    except Exception as error:  # as in read_item
        raise ItemError(f"cannot read {item.path}: {_reason(error)}. Make the file anew or remove it.") from error


def _mixed(seen: Mapping[tuple[int, int], Sequence[Item]]) -> str:
    most_first = sorted(seen.items(), key=lambda pair: -len(pair[1]))
    listed = ", ".join(f"{w}x{h} ({len(items)} files, {items[0].path.name})" for (h, w), items in most_first[:4])
    more = f" and {len(seen) - 4} more" if len(seen) > 4 else ""
    return f"items have different sizes: {listed}{more}. Bring them to one size, or evaluate each size on its own."
