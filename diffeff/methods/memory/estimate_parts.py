"""Stand-ins for a pipeline's parts: each traces the part's forward on fake tensors and returns zeros of its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from diffeff.methods.memory.estimate_ops import Ledger, Tally, Watch

__all__ = ["Blank", "StandIn", "Tracer", "plant"]


@dataclass(frozen=True)
class Blank:
    """What is left of an output: enough to make zeros like it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Tracer:
    """One fake world and one ledger for all parts of a dry run."""

    def __init__(self, most: int | None = None) -> None:
        self.ledger = Ledger(most)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.inside = False

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function` on fake tensors; its output as blanks."""
        self.inside = True
        try:
            with _disable_current_modes(), self.fake, Watch(self.ledger, self.fake):
                return _map(function(*args, **kwargs), _blank)
        finally:
            self.inside = False


class StandIn:
    """Stands in for one callable of a part. Calls of a kind already traced often enough only return their zeros.

    `again` says whether a kind that was traced before is to be traced once more.
    """

    def __init__(self, tracer: Tracer, part: str, stage: str, inner: Callable[..., Any]) -> None:
        self._tracer, self._part, self._stage, self._inner = tracer, part, stage, inner
        self._known: dict[Any, tuple[Any, Tally]] = {}
        self.again: Callable[[], bool] = lambda: False
        self.done: Callable[[], None] = lambda: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = self._tracer
        if tracer.inside:
            return self._inner(*args, **kwargs)
        stage = tracer.ledger.enter(self._stage)
        stage.parts.add(self._part)
        stage.calls += 1
        kind, base = _kind((args, kwargs)), tracer.ledger.live.now
        traced = kind not in self._known or self.again()
        if traced:
            self._known[kind] = self._traced(args, kwargs)
        blanks, work = self._known[kind]
        stage.add(work, base)
        if traced:
            self.done()
        return _map(blanks, _fill)

    def _traced(self, args: Any, kwargs: Any) -> tuple[Any, Tally]:
        """One call in a tally of its own."""
        ledger = self._tracer.ledger
        work = Tally()
        with ledger.apart(work):
            blanks = self._tracer.run(self._inner, args, kwargs)
        return blanks, work


def plant(stack: ExitStack, owner: Any, name: str, stand_in: Any) -> None:
    """Put a stand-in into an instance until the stack closes."""
    had, before = name in vars(owner), vars(owner).get(name)
    owner.__dict__[name] = stand_in
    stack.callback(_uproot, owner, name, had, before)


def _uproot(owner: Any, name: str, had: bool, before: Any) -> None:
    if had:
        owner.__dict__[name] = before
    else:
        del owner.__dict__[name]


def _kind(values: Any) -> Any:
    """What a call's work depends on: shapes, and plain values."""
    leaves = tree_leaves(values)
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in leaves)


def _blank(leaf: Any) -> Any:
    return Blank(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _fill(leaf: Any) -> Any:
    return leaf.zeros() if isinstance(leaf, Blank) else leaf


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change the tensors of an output, those inside plain objects (a VAE's distribution) included."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor | Blank):
            return change(x)
        if type(x).__module__.startswith("diffusers.") and hasattr(x, "__dict__"):
            made = copy.copy(x)
            made.__dict__.update({key: _map(inner, change) for key, inner in vars(x).items()})
            return made
        return x

    return tree_map(leaf, value)
