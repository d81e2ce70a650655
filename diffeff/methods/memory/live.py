"""Bytes of tensors alive at once: what a stretch of work really holds, on any device and for fake tensors too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Held", "Live", "live_activations"]


@dataclass(frozen=True)
class Held:
    """One storage that was alive at the peak: its bytes, the shape it was created with, and the operator."""

    bytes: int
    shape: tuple[int, ...]
    operator: str


class Live:
    """Filled while the block runs.

    `now`, `peak`: bytes of the storages created inside the block that are, and at most were, alive at once. `at`: the
    operator after which the peak stood. `held`: what was alive then, largest first; recorded on request only.
    Scratch memory inside an operator is not seen: compare with the resident set for that.
    """

    def __init__(self, record: bool = False) -> None:
        self.now = 0
        self.peak = 0
        self.at = ""
        self.held: tuple[Held, ...] = ()
        self._record = record
        self._known: dict[int, Held | None] = {}
        self._ends: list[weakref.finalize[..., UntypedStorage]] = []

    def reset_peak(self) -> None:
        """Forget the peak so far and start from what is alive now."""
        self.peak, self.at, self.held = self.now, "", ()

    def foreign(self, tensor: Tensor) -> None:
        """A tensor that an operator reads: unless it was born in here, it was there before and does not count."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._watch(storage, None)

    def born(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self.now += storage.nbytes()
        self._watch(storage, Held(storage.nbytes(), tuple(tensor.shape), operator))

    def _watch(self, storage: UntypedStorage, held: Held | None) -> None:
        self._known[storage._cdata] = held
        self._ends.append(weakref.finalize(storage, self._died, storage._cdata))

    def _died(self, key: int) -> None:
        held = self._known.pop(key, None)
        if held is not None:
            self.now -= held.bytes

    def mark(self, operator: str) -> None:
        if self.now <= self.peak:
            return
        self.peak, self.at = self.now, operator
        if self._record:
            alive = (held for held in self._known.values() if held is not None)
            self.held = tuple(sorted(alive, key=lambda held: -held.bytes))

    def close(self) -> None:
        for end in self._ends:
            end.detach()
        self._ends.clear()
        self._known.clear()


class _Trace(TorchDispatchMode):
    def __init__(self, live: Live) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._live.foreign(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._live.born(leaf, str(func))
        self._live.mark(str(func))
        return result


@contextmanager
def live_activations(*, record: bool = False) -> Iterator[Live]:
    """Trace every operator inside the block and keep count of the bytes of tensor storages it creates.

    Weights and whatever else existed before are not counted. Runs under `FakeTensorMode` as well (enter that first),
    where a model of any size is traced without memory. `record=True` also keeps what was alive at the peak. The block
    runs slower by some microseconds an operator; do not time it.
    """
    live = Live(record)
    try:
        with _Trace(live):
            yield live
    finally:
        live.close()
