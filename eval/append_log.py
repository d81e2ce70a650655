"""Files that survive a kill, and digests that say whether what is in them still counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from diffeff.errors import OutputError

__all__ = ["AppendLog", "WritingTo", "code_digest", "digest"]


def digest(value: Any, length: int = 12) -> str:
    """First hex digits of the sha256 of a value's canonical JSON: names folders and keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@cache
def code_digest(*modules: str) -> str:
    """First hex digits of the sha256 of the sources of modules and of all below packages: what was computed by other
    code is not taken for what this code would compute."""
    found = hashlib.sha256()
    for module in modules:
        spec = find_spec(module)
        folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
        files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
        if spec is not None and spec.origin is not None and not folders:
            files = [Path(spec.origin)]
        for file in files:
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


class AppendLog:
    """JSON lines that survive a kill: a last line without its end is cut off when the file is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
        for line in data[:whole].splitlines():
            try:
                record = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError):
                continue  # a damaged line: what it stood for is computed again
            if isinstance(record, dict):
                yield record

    def append(self, record: Mapping[str, Any]) -> None:
        """One line, in one write. Raises OutputError when the disk is full."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with WritingTo(self.path), self.path.open("ab") as file:
            file.write(line)


class WritingTo:
    """Turns what the system says of a file into OutputError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            reason = error.strerror or error
            raise OutputError(
                f"cannot write {self.path}: {reason}. Free some space or choose another place."
            ) from error
