"""What a bench has finished, on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffeff.errors import OutputError
from diffeff.files import write_text

__all__ = ["Store", "digest", "scratch_folder"]


def digest(facts: Any) -> str:
    """First 16 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


class Store:
    """A folder of small JSON files, each written whole or not at all. Its name holds everything that defines the run,
    so that results of another model, arm, machine or version are never mixed in."""

    def __init__(self, root: Path, facts: Mapping[str, Any]) -> None:
        self.folder = root / digest(facts)
        write_text(self.folder / "bench.json", json.dumps(dict(facts), indent=2) + "\n")

    def get(self, name: str) -> dict[str, Any] | None:
        """What was kept under this name; None when there is nothing, or nothing that can be read."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def put(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep this."""
        write_text(self.folder / f"{name}.json", json.dumps(dict(data)))

    def clear(self) -> None:
        """Remove the folder, and its parent when that is empty: the next bench measures anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # not empty: another bench's results
            self.folder.parent.rmdir()


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A folder under `root` for the length of a block; those that killed processes left behind are removed first.

    Raises OutputError when it cannot be made.
    """
    for left in root.glob("scratch-*"):
        if not _running(left.name.split("-")[1]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f"scratch-{os.getpid()}-", dir=root)
    except OSError as error:
        raise OutputError(f"cannot write {root}: {error.strerror or error}. Choose another place.") from error
    with folder as name:
        yield Path(name)
    with suppress(OSError):  # not empty: unfinished results
        root.rmdir()


def _running(pid: str) -> bool:
    if os.name == "nt":  # there, signal 0 is no question
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # another user's
        return True
    return True
