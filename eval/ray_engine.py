"""The engine that spreads work over the workers of a Ray cluster, or over processes of this machine.

Each worker is a Ray actor with one item at hand. Whatever crosses a process border is pickled here rather than by Ray:
arrays then arrive writable and with memory of their own, as they would be without Ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from diffeff import __version__
from diffeff.errors import ConfigError, DiffEffError, MissingExtra
from diffeff.eval.ray_worker import Worker, pack

__all__ = ["RETRIES", "RayEngine", "WorkerLost"]

logger = logging.getLogger("diffeff")

RETRIES = 2
"""How often an item is tried again after its worker died."""

State = TypeVar("State")
Item = TypeVar("Item")
Value = TypeVar("Value")


class WorkerLost(DiffEffError):
    """Workers died again and again at the same item, as they do for want of memory; names the item and the reason."""


class RayEngine:
    """Spreads items over `workers` processes; joins a Ray cluster, or starts one here and stops it again.

    `address` is that of a cluster (`host:port`, `auto`), `local` a fresh one on this machine. None means the one of
    RAY_ADDRESS, else the one `ray start` made on this machine, else a fresh local one: it needs no network and sends
    no usage reports. On a cluster of several machines diffeff must be installed on each, in the same version, and
    every path must mean the same files; environment variables of this process do not reach its workers.

    Raises MissingExtra when Ray is not installed. See `open_engine` for `threads` and `gpus`.
    """

    name = "ray"

    def __init__(
        self, workers: int = 2, *, threads: int | None = None, gpus: float = 0.0, address: str | None = None
    ) -> None:
        self._ray = _import_ray()
        self.workers = workers
        self.events: list[str] = []
        self.gpus = gpus
        self.threads = threads or max(1, _threads_here() // workers)
        self._address = address
        self._cluster: str | None = None
        self._ours = False  # we started the cluster, so we stop it
        self._actors: dict[int, Any] = {}

    def map(
        self, function: Callable[[State, Item], Value], items: Iterable[Item], *, setup: Callable[[], State]
    ) -> Iterator[tuple[int, Value]]:
        """See `Engine.map`. Worker processes stay for the next call, but for those at work when the loop is left."""
        job = pack((__version__, pack(setup, "setup"), pack(function, "function")), "job")
        tasks = (_Task(index, item) for index, item in enumerate(items))
        first = next(tasks, None)
        if first is None:
            return  # nothing to do: no cluster is started for it
        self._connect()
        run = _Run(self, job)
        try:
            yield from run.over(chain([first], tasks))
        finally:
            for slot, _ in run.running.values():
                self._end(slot)

    def describe(self) -> Mapping[str, Any]:
        return {
            "engine": self.name,
            "ray": self._ray.__version__,
            "cluster": self._cluster,
            "workers": self.workers,
            "threads": self.threads,
            "gpus": self.gpus,
            "events": self.events,
        }

    def close(self) -> None:
        """End the workers, and the cluster if this engine started it."""
        self._end_workers()
        if self._ours:
            self._ours = False
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        if not self._ray.is_initialized():
            self._ours = True
            _start(self._ray, self._address, self.workers)
        if self._cluster is None:
            self._cluster = str(self._ray.get_runtime_context().gcs_address)
            self._fit()

    def _fit(self) -> None:
        """No more workers than the cluster has room for: the rest would wait for ever."""
        have = self._ray.cluster_resources()
        room = int(have.get("CPU", 0))
        if self.gpus:
            room = min(room, int(have.get("GPU", 0) / self.gpus))
        if room < 1:
            need = f"1 CPU and {self.gpus:g} GPU" if self.gpus else "1 CPU"
            raise ConfigError(f"the Ray cluster at {self._cluster} has no room for a worker of {need}.")
        if room < self.workers:
            self._say(f"{room} workers instead of {self.workers}: the Ray cluster has no room for more")
            self.workers = room

    def _say(self, event: str) -> None:
        self.events.append(event)
        logger.warning("%s", event)

    def _worker(self, slot: int) -> Any:
        """The actor of that slot, started when it is not there."""
        if slot not in self._actors:
            remote = self._ray.remote(Worker).options(num_cpus=1, num_gpus=self.gpus, max_restarts=0)
            self._actors[slot] = remote.remote(self.threads, str(Path.cwd()))
        return self._actors[slot]

    def _lost(self, slot: int, task: _Task, error: Exception) -> None:
        """Note the death of a worker; the next task of its slot starts another. Raises WorkerLost after RETRIES."""
        self._end(slot)
        task.losses += 1
        reason = _reason(error)
        if task.losses > RETRIES:
            raise WorkerLost(
                f"{task.losses} workers died one after the other at item {task.index}: {reason}. "
                "If they ran out of memory, use fewer workers; else try this item with the local engine."
            ) from error
        self._say(
            f"a worker died at item {task.index} ({reason}); the item was given to another, try {task.losses + 1}"
        )

    def _end_workers(self) -> None:
        for slot in list(self._actors):
            self._end(slot)

    def _end(self, slot: int) -> None:
        actor = self._actors.pop(slot)
        if self._ray.is_initialized():
            self._ray.kill(actor)


@dataclass(slots=True)
class _Task:
    index: int
    item: Any
    losses: int = 0


class _Run:
    """One call of `map`: which task is at which worker. Never more tasks in flight than workers."""

    def __init__(self, engine: RayEngine, job: bytes) -> None:
        self.engine = engine
        self.ray = engine._ray
        self.job = job
        self.idle = list(range(engine.workers))[::-1]
        self.running: dict[Any, tuple[int, _Task]] = {}
        self.again: deque[_Task] = deque()
        self.failed: list[tuple[int, Exception]] = []

    def over(self, tasks: Iterator[_Task]) -> Iterator[tuple[int, Any]]:
        """Results as they come. Workers get their next task before a result is handed out, so none waits for us."""
        ready: tuple[int, Any] | None = None
        while True:
            self._hand_out(tasks)
            if ready is not None:
                yield ready
            if not self.running:
                break
            ready = self._next()
        if self.failed:
            raise min(self.failed, key=lambda pair: pair[0])[1]

    def _hand_out(self, tasks: Iterator[_Task]) -> None:
        while self.idle and not self.failed:
            task = self.again.popleft() if self.again else next(tasks, None)
            if task is None:
                return
            slot = self.idle.pop()
            item = pack(task.item, f"item {task.index}")
            self.running[self.engine._worker(slot).call.remote(self.job, item)] = (slot, task)

    def _next(self) -> tuple[int, Any] | None:
        """Wait for one task. None when it has to be done again, or failed: then nothing new is handed out."""
        (reference,), _ = self.ray.wait(list(self.running), num_returns=1)
        slot, task = self.running.pop(reference)
        try:
            fine, value = pickle.loads(self.ray.get(reference))
        except self.ray.exceptions.RayError as error:
            self._died(slot, task, error)
            return None
        finally:
            self.idle.append(slot)
        if fine:
            return task.index, value
        self.failed.append((task.index, value))
        return None

    def _died(self, slot: int, task: _Task, error: Exception) -> None:
        try:
            self.engine._lost(slot, task, error)
            self.again.append(task)
        except WorkerLost as lost:  # like any failure it waits until the results under way are in
            self.failed.append((task.index, lost))


def _reason(error: Exception) -> str:
    """The telling clause of Ray's long messages, from the first cause of the error."""
    while error.__cause__ is not None:
        error = cast("Exception", error.__cause__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "because" in line or "Error" in line or "memory" in line]
    return (telling or lines or [type(error).__name__])[-1].split(" Worker exit type")[0].split(" Note:")[0].rstrip(".")


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtra(
            f"the engine 'ray' needs Ray ({error}). Install it with: pip install 'diffeff[ray]', "
            "or use the engine 'local'."
        ) from error


def _threads_here() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else os.cpu_count() or 1


def _start(ray: Any, address: str | None, workers: int) -> None:
    """Join the cluster, or start one of `workers` CPUs. Without a network its address is that of the loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    named = os.environ.get("RAY_ADDRESS") or address or "local"
    try:
        if named != "local":
            _answering(named)
            ray.init(**quiet)
            return
        try:
            ray.init(num_cpus=workers, include_dashboard=False, **quiet)
        except ValueError:  # `ray start` made a cluster here, and its size cannot be chosen by those who join
            ray.init(**quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = _reason(error)
        advice = "Set RAY_AUTH_MODE=token" if "AuthToken" in reason else "Check the address (RAY_ADDRESS)"
        raise DiffEffError(
            f"cannot reach or start the Ray cluster ({named}): {reason}. {advice}, or use the engine 'local'."
        ) from error


def _answering(address: str) -> None:
    """Raise OSError at once when nobody listens at `host:port`: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
