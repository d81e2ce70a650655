"""The parent's end of a worker process: start it, ask it, and notice when it dies or hangs."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from diffeff.errors import DiffEffError

__all__ = ["Child", "WorkerDied", "WorkerError"]

_MODULE = "diffeff.eval.bench.worker"


class WorkerError(DiffEffError):
    """An arm failed in its worker; `phase`, `kind` and the message are the package's own."""

    def __init__(self, phase: str, kind: str, message: str, ours: bool = False) -> None:
        super().__init__(f"[{phase}] {kind}: {message}")
        self.phase, self.kind, self.message, self.ours = phase, kind, message, ours

    def to_dict(self) -> dict[str, str]:
        """As it stands in a row."""
        return {"phase": self.phase, "type": self.kind, "message": self.message}


class WorkerDied(WorkerError):
    """The process ended or took too long: it must be started anew."""


class Child:
    """One worker process. What the packages print is kept in `log`, of which the end is told when the process dies."""

    def __init__(self, job: Mapping[str, Any], log: Path, limit: float) -> None:
        self.log, self.limit = log, limit
        self.warmed: set[str] = set()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            safe = ["-P"] if sys.flags.safe_path else []
            self._process = subprocess.Popen(
                [sys.executable, *safe, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends its workers
            )
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._replies), daemon=True).start()
        try:
            self.ask(job)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises WorkerError for an error of the arm, WorkerDied when there is no reply."""
        phase = str(message.get("do", "load"))
        try:
            self._send(message)
            line = self._replies.get(timeout=self.limit)
        except queue.Empty:
            self.close()
            raise WorkerDied(
                phase, "TimeoutError", f"no answer within {self.limit:g} s; the process was ended"
            ) from None
        if line is None:
            raise self._died(phase)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            error = reply["error"]
            raise WorkerError(error["phase"], error["type"], error["message"], bool(error["ours"]))
        return reply

    def close(self) -> None:
        """End the process; harmless when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                _close(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process.stdin is None:
            raise DiffEffError("the worker was started without a pipe")
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._replies.put(None)

    def _died(self, phase: str) -> WorkerDied:
        code = self._process.wait()
        cause = " (killed: out of memory?)" if code == -9 else ""
        said = self.log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        return WorkerDied(phase, "WorkerDied", f"the process ended with code {code}{cause}. {' '.join(said)}".strip())


def _listen(stream: IO[str] | None, replies: queue.Queue[str | None]) -> None:
    """Hand the worker's lines on, and None when it ends."""
    with contextlib.suppress(ValueError):  # closed by the parent while waiting
        for line in stream or ():
            replies.put(line)
    replies.put(None)


def _close(stream: IO[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        stream.close()
