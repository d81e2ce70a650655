"""The two streams of the command line: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["complain", "emit", "err", "out", "quiet_libraries", "start_logging", "table"]


def out() -> Console:
    """The console of results. Made per use, so that it writes to whatever stdout is at that moment."""
    return _console(sys.stdout)


def err() -> Console:
    """The console of progress, warnings and errors."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    """In a pipe or a file, lines are not wrapped and tables get room. `module:package:f` is not an emoji."""
    piped = not stream.isatty()
    width = 140 if piped and "COLUMNS" not in os.environ else None
    return Console(file=stream, highlight=False, emoji=False, soft_wrap=piped, width=width)


def emit(data: Mapping[str, Any]) -> None:
    """Print one JSON object, and nothing else, on stdout. A number JSON cannot hold becomes null."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def complain(kind: str, message: str) -> None:
    """One line about what went wrong, on stderr."""
    err().print(f"[bold red]{kind}:[/] {escape(message)}")


def table(*columns: str) -> Table:
    """A light table with these columns."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


class _Once(logging.Filter):
    """Lets each message through once: a comparison runs the same pipeline many times."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        fresh = text not in self.seen
        self.seen.add(text)
        return fresh


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        err().print(f"[yellow]{record.levelname.lower()}:[/] {escape(record.getMessage())}")


def start_logging(debug: bool) -> None:
    """Send diffeff's log to stderr: warnings, or everything with `debug`."""
    handler = _Stderr()
    if not debug:
        handler.addFilter(_Once())
    log = logging.getLogger("diffeff")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG if debug else logging.WARNING)


def quiet_libraries() -> None:
    """Turn off the progress bars of diffusers and transformers: the command line shows its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
