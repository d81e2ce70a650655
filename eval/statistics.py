"""Reference statistics: the features of a reference set in one file, so that the set itself is needed only once.

The file is safetensors: an array of rows for each kind of vector, and beside them which source made them, how pixels
were prepared and which items they come from. A source or a preparation that differs is refused, never converted:
numbers from different features mean nothing together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ArtefactError, ConfigError, ModelLoadError, OutputError
from diffeff.files import replacing, sha256
from diffeff.loading import check_safetensors

__all__ = ["SUFFIX", "Statistics", "load", "save"]

SUFFIX = ".safetensors"
_FORMAT = "1"
_BLOCK = 4096
Rows = NDArray[np.float32]

_FREE = frozenset({"spec", "label", "device"})
"""Parts of a source's description that may differ: they do not decide a number beyond rounding."""


@dataclass(frozen=True)
class Statistics:
    """A reference set as its features. `rows` are memory maps `[N, dim]` by name, `sources` what made each of them,
    `counts` how many rows each item has, in the order of the rows.

    `items` and `content` are the number of items and the checksum over their contents; `origin` says where they lay.
    """

    path: Path
    rows: Mapping[str, Rows]
    sources: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, Sequence[int]]
    items: int
    content: str
    origin: str

    def of(self, name: str, source: Mapping[str, Any]) -> Rows:
        """The rows of one kind, after checking that this very source made them. Raises ConfigError."""
        if name not in self.rows:
            raise ConfigError(
                f"{self.path} holds features of {', '.join(self.rows)}, not the {name} that are asked for. Make the "
                "statistics anew with the same metrics and features."
            )
        theirs, ours = self.sources[name], json.loads(json.dumps(dict(source), default=str))
        differing = [key for key in sorted({*theirs, *ours} - _FREE) if theirs.get(key) != ours.get(key)]
        if differing:
            shown = "; ".join(f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing[:3])
            raise ConfigError(
                f"{self.path} was made with other features ({theirs.get('spec')!r}): {shown}. Numbers from different "
                "features cannot be compared; choose that source with --features, or make the statistics anew."
            )
        return self.rows[name]

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for a report."""
        return {
            "kind": "statistics",
            "path": str(self.path),
            "file_sha256": sha256(self.path),
            "items": self.items,
            "sha256": self.content,
            "origin": self.origin,
        }


def save(
    path: Path,
    rows: Mapping[str, Rows],
    sources: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, Sequence[int]],
    content: Mapping[str, Any],
    origin: str,
) -> Path:
    """Write the features of a reference set, whole or not at all; `content` has `items` and `sha256`.

    Rows are copied block by block, so memory maps of any size will do. Raises OutputError.
    """
    if path.suffix.lower() != SUFFIX:
        raise OutputError(f"cannot write {path}: statistics are kept in one {SUFFIX} file. Name it so.")
    facts = {
        "sources": {name: dict(sources[name]) for name in rows},
        "counts": {name: list(counts[name]) for name in rows},
        "content": dict(content),
        "origin": origin,
    }
    header = _header(rows, {"diffeff_statistics": _FORMAT, "facts": json.dumps(facts, default=str)})
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in rows.values():
            for start in range(0, len(array), _BLOCK):
                file.write(np.ascontiguousarray(array[start : start + _BLOCK], dtype="<f4").tobytes())
    return path


def _header(rows: Mapping[str, Rows], metadata: Mapping[str, str]) -> bytes:
    """The header of the safetensors format: where each array begins and ends behind it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in rows.items():
        end = start + 4 * array.size
        entries[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def load(path: Path) -> Statistics:
    """Open a file that `save` wrote; rows are read when they are used.

    Raises ArtefactError for a file that is damaged or something else, and says what to do with the .npz of other tools.
    """
    if path.suffix.lower() in (".npz", ".npy", ".pkl"):
        raise ArtefactError(
            f"{path} does not say which network and which preparation of pixels made it, so nothing can be compared "
            "with it. Give the folder of reference items; --stats keeps their statistics for the next time."
        )
    try:
        check_safetensors(path)
        header, start = _read_header(path)
        metadata = header.pop("__metadata__", {})
        facts = json.loads(metadata["facts"]) if metadata.get("diffeff_statistics") == _FORMAT else None
    except (ModelLoadError, OSError, ValueError, KeyError) as error:
        raise ArtefactError(f"{path} holds no reference statistics: {error}. Make it anew with --stats.") from error
    if facts is None:
        raise ArtefactError(f"{path} was not written by `diffeff eval --stats`, or by one of another format version")
    rows = {name: _rows(path, start, entry) for name, entry in header.items()}
    content = facts["content"]
    return Statistics(
        path, rows, facts["sources"], facts["counts"], content["items"], content["sha256"], facts["origin"]
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


def _rows(path: Path, start: int, entry: Mapping[str, Any]) -> Rows:
    offset = start + entry["data_offsets"][0]
    return np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=tuple(entry["shape"]))
