"""The workers of a bench: one process per package, all alive, or one at a time when the model is large."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffeff.errors import DiffEffError
from diffeff.eval.bench.arms import Arm
from diffeff.eval.bench.channel import Child, WorkerError

__all__ = ["Pool", "needs_turns"]


class Pool:
    """Starts a worker when it is first needed, warms it up for an arm before that arm is timed, and starts it anew
    after an error: other tools leave their state behind when they are interrupted.

    `job` is what `worker.Job` takes, `limit` the seconds a worker may take for one answer. With `turns` at most one
    worker is alive.
    """

    def __init__(self, job: Mapping[str, Any], folder: Path, limit: float) -> None:
        self.job, self.folder, self.limit = job, folder, limit
        self.turns = False
        self._children: dict[str, Child] = {}
        self._numbers = count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self, worker: str) -> dict[str, Any]:
        """What a worker says of the model. Raises DiffEffError when it cannot be loaded."""
        try:
            return self._child(worker).ask({"do": "describe"})
        except WorkerError as error:
            self.drop(worker)
            if error.ours:
                raise DiffEffError(error.message) from error
            raise

    def run(self, worker: str, arm: Arm, request: Mapping[str, Any], frames: Path) -> dict[str, Any]:
        """A timed run of an arm, whose process has run that arm before. Raises WorkerError."""
        if arm.key not in self._alive(worker):
            self.ask(worker, "count", arm, request)
        return self.ask(worker, "run", arm, {**request, "frames": str(frames)})

    def ask(self, worker: str, what: str, arm: Arm, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request about an arm; a worker in which it fails is ended. Raises WorkerError."""
        try:
            child = self._child(worker)
            reply = child.ask({"do": what, "arm": arm.to_dict(), **request})
        except WorkerError as error:
            if not (error.ours and error.phase in ("apply", "import")):  # nothing was touched
                self.drop(worker)
            raise
        child.warmed.add(arm.key)
        return reply

    def fresh(self, what: str, arm: Arm, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request to a process of its own. Raises WorkerError."""
        if self.turns:
            self.close()
        with Child(self.job, self._log(f"{what}-{arm.key}"), self.limit) as child:
            return child.ask({"do": what, "arm": arm.to_dict(), **request})

    def drop(self, worker: str) -> None:
        """End a worker; the next request starts it anew."""
        child = self._children.pop(worker, None)
        if child is not None:
            child.close()

    def close(self) -> None:
        """End all of them."""
        for worker in list(self._children):
            self.drop(worker)

    def _alive(self, worker: str) -> set[str]:
        return self._children[worker].warmed if worker in self._children else set()

    def _child(self, worker: str) -> Child:
        if worker not in self._children:
            if self.turns:
                self.close()
            self._children[worker] = Child(self.job, self._log(worker), self.limit)
        return self._children[worker]

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}-{next(self._numbers)}.log"


def needs_turns(held: int | None, available: int | None, workers: int) -> bool:
    """Whether so many workers, each with one copy of the model (`held` bytes), leave too little memory to run.

    `available` is what is free beside one copy; a run is granted half a copy more. Unknown numbers count as little.
    """
    if held is None or available is None or workers < 2:
        return False
    everything = held + available
    return held > everything / 4 or 1.5 * held * workers > everything
