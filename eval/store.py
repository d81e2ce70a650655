"""What has been computed stays computed: features and per-item numbers on disk, keyed by the content of the files.

Both stores only ever append, data first and its index line last, so a process killed at any moment loses the item it
was at and nothing else. A line or a row that is not whole is dropped when a store is opened again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError, OutputError
from diffeff.eval.append_log import AppendLog, WritingTo, digest
from diffeff.files import write_text

__all__ = ["FeatureStore", "ScalarStore", "WorkFolder"]

Rows = NDArray[np.float32]
_BLOCK = 4096  # rows read or copied at once


class FeatureStore:
    """Feature vectors of one source, float32 `[rows, dim]` in one flat file, any number of rows per key.

    `folder` belongs to one source with one preprocessing, which `source` describes. A key is the sha256 of a file's
    content, so identical files share their rows. Rows are read through a memory map: a set of any size costs no
    memory.
    """

    def __init__(self, folder: Path, dim: int, source: Mapping[str, Any]) -> None:
        self.folder, self.dim = folder, dim
        self._index: dict[str, tuple[int, int]] = {}
        self._log = AppendLog(folder / "index.jsonl")
        if not (folder / "source.json").exists():
            write_text(folder / "source.json", json.dumps({"dim": dim, **source}, indent=2, default=str) + "\n")
        self._path = folder / "rows.f32"
        with self._path.open("a+b") as rows:
            self._load(rows)

    def _load(self, rows: BinaryIO) -> None:
        """Keep the entries whose rows are there and unharmed; cut off what stands behind the last of them."""
        width = 4 * self.dim
        size = rows.seek(0, os.SEEK_END) // width
        for entry in self._log.records:
            start, count = int(entry["start"]), int(entry["count"])
            rows.seek(start * width)
            if start + count <= size and zlib.crc32(rows.read(count * width)) == entry["crc32"]:
                self._index[entry["key"]] = start, count
        self._end = max((start + count for start, count in self._index.values()), default=0)
        rows.truncate(self._end * width)
        self._log.records.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def add(self, key: str, rows: Rows) -> None:
        """Keep `rows` `[n, dim]` under `key`; a key that is there already keeps its first rows.

        Raises ConfigError for rows of another shape or with a value that is no number: stored, they would spoil
        every later result.
        """
        if key in self._index:
            return
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ConfigError(f"the feature source gave an array of shape {rows.shape}; expected [n, {self.dim}]")
        if not np.isfinite(rows).all():
            raise ConfigError("the feature source gave values that are not numbers; check its weights and precision")
        data = np.ascontiguousarray(rows, dtype="<f4").tobytes()
        with WritingTo(self._path), self._path.open("r+b") as file:
            file.seek(self._end * 4 * self.dim)  # over what a full disk may have cut off
            file.write(data)
        self._log.append({"key": key, "start": self._end, "count": len(rows), "crc32": zlib.crc32(data)})
        self._index[key] = self._end, len(rows)
        self._end += len(rows)

    def count(self, key: str) -> int:
        """How many rows a key has."""
        return self._index[key][1]

    def get(self, key: str) -> Rows:
        """The rows of one key, `[n, dim]`."""
        start, count = self._index[key]
        return np.array(self._map()[start : start + count])

    def gather(self, keys: Sequence[str]) -> Rows:
        """The rows of all `keys`, one after the other in their order, as a memory map `[N, dim]`.

        The order in which they were computed does not show. Rows that do not lie in order already are copied, block
        by block, to a file of the system's temporary folder that vanishes with the array.
        """
        order = self._order(keys)
        everything = self._map()
        if len(order) and np.array_equal(order, np.arange(order[0], order[0] + len(order))):
            return everything[order[0] : order[0] + len(order)]
        with tempfile.TemporaryFile() as file:
            for block in range(0, len(order), _BLOCK):
                file.write(np.ascontiguousarray(everything[order[block : block + _BLOCK]]).tobytes())
            file.flush()
            return _mapped(file, len(order), self.dim)

    def _order(self, keys: Sequence[str]) -> NDArray[np.int64]:
        spans = [np.arange(start, start + count) for start, count in (self._index[key] for key in keys)]
        return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)

    def _map(self) -> Rows:
        return _mapped(self._path, self._end, self.dim)


def _mapped(file: Any, rows: int, dim: int) -> Rows:
    if rows == 0:
        return np.empty((0, dim), dtype=np.float32)
    return np.memmap(file, dtype="<f4", mode="r", shape=(rows, dim))


class ScalarStore:
    """Numbers of single items (a PSNR, a flicker), each a flat mapping of names to floats, by key."""

    def __init__(self, path: Path) -> None:
        self._log = AppendLog(path)
        self._values = {entry["key"]: _decoded(entry["values"]) for entry in self._log.records}
        self._log.records.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Mapping[str, float]:
        return self._values[key]

    def add(self, key: str, values: Mapping[str, float]) -> None:
        """Keep the numbers of one item; infinite and missing ones (nan) too."""
        if key not in self._values:
            self._log.append({"key": key, "values": _encoded(values)})
            self._values[key] = dict(values)


def _encoded(values: Mapping[str, float]) -> dict[str, float | str]:
    """Floats as JSON has them, exact to the last bit; what JSON lacks as text."""
    return {name: float(v) if math.isfinite(v) else str(float(v)) for name, v in values.items()}


def _decoded(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


class WorkFolder:
    """The folder in which an evaluation keeps what it has computed; one process at a time may use it.

    `features/<source>-<what>/`, `scalars/<name>.jsonl` and `generated/<key>/`. The lock is the system's and goes with
    the process, however that ends. Raises OutputError for a folder that cannot be written or is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = ExitStack()
        self._stores: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with WritingTo(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+b")
        with ExitStack() as held:
            held.enter_context(lock)
            _lock(lock, self.path)
            self._open = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._stores.clear()

    def features(self, source: Mapping[str, Any], what: str, dim: int) -> FeatureStore:
        """The store of one source's vectors of one kind (`frames16`, `clips`, `texts`).

        Everything of the description but the way the user spelled the source decides, so that weights or a
        preprocessing that changed never meet old vectors.
        """
        known = {key: value for key, value in source.items() if key not in ("spec", "label")}
        name = f"{digest(known)}-{what}"
        if name not in self._stores:
            with WritingTo(self.path):
                store = FeatureStore(self.path / "features" / name, dim, source)
            self._stores[name] = store
        found: FeatureStore = self._stores[name]
        return found

    def scalars(self, name: str) -> ScalarStore:
        """The store of one group of per-item numbers."""
        if name not in self._stores:
            with WritingTo(self.path):
                store = ScalarStore(self.path / "scalars" / f"{name}.jsonl")
            self._stores[name] = store
        found: ScalarStore = self._stores[name]
        return found


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two evaluations in one folder are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            f"{folder} is in use by another evaluation. Wait for it, or give this one a folder of its own with --work."
        ) from error
