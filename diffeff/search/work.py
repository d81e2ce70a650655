"""The work file of a tuning run: what each candidate gave, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffeff.errors import OutputError

__all__ = ["WorkFile"]


class WorkFile:
    """Append-only JSON lines, each with the key of what it is about. Without a path nothing is kept between runs.

    `subject` is everything a result depends on besides the candidate (model, call, prompts, seeds): results of
    another subject in the same file are left alone. A last line cut off by a kill is dropped.
    """

    def __init__(self, path: Path | None, subject: Mapping[str, Any]) -> None:
        self.path, self.subject = path, _digest(subject)
        self.kept: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise OutputError(f"cannot read the work file {path}: {error.strerror}. Choose another place.") from error
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.kept[entry["key"]] = entry["value"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            self._append("")

    def key(self, *what: Any) -> str:
        return f"{self.subject}-{_digest(what)}"

    def get(self, *what: Any) -> Any:
        """What was kept under these words; None if nothing."""
        return self.kept.get(self.key(*what))

    def put(self, value: Any, *what: Any) -> None:
        """Keep `value` (JSON-ready) under these words. Raises OutputError where the file cannot be written."""
        self.kept[self.key(*what)] = value
        if self.path is not None:
            self._append(json.dumps({"key": self.key(*what), "what": what, "value": value}))

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write the work file {self.path}: {error.strerror}. Choose another place."
            ) from error


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
