"""Where the work of an evaluation runs: in this process, or spread over the workers of a Ray cluster.

An engine knows nothing of models and metrics. It is given a picklable `setup`, which every worker calls once to build
what it needs (a pipeline, a feature source), and a `function(state, item)`, which it applies to every item:

    with open_engine("ray", workers=2) as engine:
        for index, rows in engine.map(features_of, chunks, setup=SourceSpec("sprites")):
            store.append(chunks[index], rows)

Results arrive as they are ready, each with the index of its item, so a caller never depends on their order. Both
engines read `items` lazily and hold few results at a time: memory does not grow with the number of items.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from diffeff.errors import ConfigError, UnknownName, nearest

if TYPE_CHECKING:
    from diffeff.eval.ray_engine import RayEngine

__all__ = ["ENGINES", "Engine", "LocalEngine", "open_engine"]

ENGINES = ("local", "ray")

State = TypeVar("State")
Item = TypeVar("Item")
Value = TypeVar("Value")


class Engine(Protocol):
    """What the evaluation needs of a place to run.

    `events` says in words what went wrong and was mended (a worker that died and was replaced): a report quotes it.
    """

    name: str
    workers: int
    events: list[str]

    def map(
        self, function: Callable[[State, Item], Value], items: Iterable[Item], *, setup: Callable[[], State]
    ) -> Iterator[tuple[int, Value]]:
        """Apply `function(state, item)` to every item; yields (index, value) as they are ready, in any order.

        `setup` makes `state` once per worker, before its first item; equal setups in a row keep the state. Under Ray,
        `function`, `setup`, items and values must be picklable (a function of a module, a frozen dataclass with
        `__call__`), and files they name must exist on every node.

        An exception of `function` or `setup` reaches the caller as it is, after the results that were ready. Leaving
        the loop early (`break`, Ctrl-C, an error) stops the work that is under way.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """JSON-ready: engine, workers, torch threads per worker, and `events`."""
        ...

    def close(self) -> None:
        """Give back workers and states. An engine is also a context manager that does this."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_engine(
    name: str = "local",
    *,
    workers: int = 1,
    threads: int | None = None,
    gpus: float = 0.0,
    address: str | None = None,
) -> LocalEngine | RayEngine:
    """The engine of that name, to be used in a `with` block.

    `threads` is the number of torch threads of each worker: results are the same bits in one process and in many only
    when it is the same. None leaves this process alone, and shares its threads out among Ray's workers.
    `gpus` (may be a fraction) is what each Ray worker reserves; without it Ray shows its workers no GPU.
    `address` names a Ray cluster; see `RayEngine`.

    Raises UnknownName, ConfigError for a number out of range, MissingExtra when Ray is not installed.
    """
    if name not in ENGINES:
        raise UnknownName(f"engine {name!r} is not known. {nearest(name, ENGINES)}")
    _check(workers, threads, gpus)
    if name == "local":
        if workers != 1:
            raise ConfigError(f"workers={workers}: the local engine is this one process. Use the engine 'ray'.")
        return LocalEngine(threads=threads)
    from diffeff.eval.ray_engine import RayEngine

    return RayEngine(workers, threads=threads, gpus=gpus, address=address)


def _check(workers: int, threads: int | None, gpus: float) -> None:
    if workers < 1:
        raise ConfigError(f"workers={workers}: must be at least 1")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}: must be at least 1, or left out")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(f"gpus={gpus}: must be 0, a share below 1, or a whole number of GPUs per worker")


class LocalEngine:
    """Runs everything in this process, item after item, in order."""

    name = "local"
    workers = 1

    def __init__(self, *, threads: int | None = None) -> None:
        self.events: list[str] = []
        self._threads = threads
        self._built: tuple[Callable[[], Any], Any] | None = None

    def map(
        self, function: Callable[[State, Item], Value], items: Iterable[Item], *, setup: Callable[[], State]
    ) -> Iterator[tuple[int, Value]]:
        """See `Engine.map`; here results come in the order of the items."""
        with _torch_threads(self._threads):
            for index, item in enumerate(items):
                yield index, function(self._state(setup), item)

    def _state(self, setup: Callable[[], State]) -> State:
        if self._built is None or self._built[0] != setup:
            self._built = None  # the old state goes before the new one comes: two models may not fit
            self._built = (setup, setup())
        state: State = self._built[1]
        return state

    def describe(self) -> Mapping[str, Any]:
        return {"engine": self.name, "workers": 1, "threads": self._threads or _threads_now(), "events": self.events}

    def close(self) -> None:
        self._built = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Torch at that many threads inside the block, and as before after it."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads_now() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()
