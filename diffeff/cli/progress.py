"""Stage progress on stderr: load, encode, denoise i/n with the time left, decode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffeff.cli.console import err

__all__ = ["Stages"]


class Stages:
    """One line that says what is being done and how long it will take. `quiet`, or no terminal, shows nothing."""

    def __init__(self, quiet: bool) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = err()
        hidden = quiet or not console.is_terminal  # in a log file a moving bar is noise
        self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, stage: str, total: int | None = None, label: str | None = None) -> None:
        """Show `stage`, of `total` parts where known; `label` says of what run, until another one does."""
        self._label = self._label if label is None else label
        text = f"{self._label}: {stage}" if self._label else stage
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=total)

    def advance(self, count: float = 1) -> None:
        if self._task is not None:
            self._progress.advance(self._task, count)

    @contextmanager
    def watching(self, pipe: Any, label: str = "") -> Iterator[None]:
        """Show the stages of every call of a diffusers pipeline made inside the block.

        All diffusers pipelines open their progress bar when the loop over the steps begins and close it before
        they decode, so that a stand-in for that bar sees the stages without touching a module.
        """
        self.begin("encode", label=label)
        pipe.__dict__["progress_bar"] = lambda iterable=None, total=None: _Bar(self, iterable, total)
        try:
            yield
        finally:
            pipe.__dict__.pop("progress_bar", None)


class _Bar:
    """What diffusers expects of tqdm."""

    def __init__(self, stages: Stages, iterable: Iterable[Any] | None, total: int | None) -> None:
        items = None if iterable is None else list(iterable)
        self._stages, self._items = stages, items
        stages.begin("denoise", total if items is None else len(items))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stages.begin("decode")

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update()
        self._stages.begin("decode")

    def update(self, count: float = 1) -> None:
        self._stages.advance(count)

    def set_postfix(self, **_: object) -> None:
        """Accepted for tqdm's sake."""

    def close(self) -> None:
        """Accepted for tqdm's sake."""
