"""A ledger of operators: bytes alive, scratch, arithmetic and traffic, stage by stage, for real and fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from diffeff.errors import MethodInapplicable
from diffeff.methods.memory.estimate_scratch import scratch_bytes
from diffeff.methods.memory.live import Live

__all__ = ["Ledger", "Tally", "Watch"]

_QUESTIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
"""Operators that read a value back."""


@dataclass
class Tally:
    """One stage: `peak` bytes alive, `with_scratch` with an operator's scratch on top, and the work done in it."""

    peak: int = 0
    with_scratch: int = 0
    at: str = ""
    snapshots: int = 0
    parts: set[str] = field(default_factory=set)
    calls: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    operators: int = 0

    def add(self, call: Tally, base: int) -> None:
        """A call whose own tally is known was made when `base` bytes were alive."""
        self.see(base + call.peak, base + call.with_scratch, call.at)
        self.snapshots = max(self.snapshots, call.snapshots)
        self.flops, self.traffic = self.flops + call.flops, self.traffic + call.traffic
        self.operators += call.operators

    def see(self, alive: int, with_scratch: int, operator: str) -> None:
        """So much was alive after `operator`."""
        self.peak = max(self.peak, alive)
        if with_scratch > self.with_scratch:
            self.with_scratch, self.at = with_scratch, operator


class Ledger:
    """Everything alive in a dry run, and the stage it is in.

    Raises MethodInapplicable once more than `most` operators were traced.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most, self._count = most, 0
        self.live = Live()
        self.stages: dict[str, Tally] = {}
        self._base = 0
        self.enter("text")

    def enter(self, stage: str) -> Tally:
        """Go on in this stage."""
        self.present = self.stages.setdefault(stage, Tally())
        return self.present

    @contextmanager
    def apart(self, call: Tally) -> Iterator[None]:
        """Write into the tally of one call: bytes above what was alive when it began."""
        before = self.present, self._base
        self.present, self._base = call, self.live.now
        try:
            yield
        finally:
            self.present, self._base = before

    def before(self, inputs: list[Tensor]) -> None:
        """What an operator reads was there before it."""
        for tensor in inputs:
            self.live.foreign(tensor)

    def after(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], result: Any) -> None:
        """An operator has run: note what it made, its scratch and its work."""
        name = func._schema.name
        outputs = _tensors(result)
        for tensor in outputs:
            self.live.born(tensor, name)
        self._mark(name, args, outputs)
        if not _is_view(func):
            self._work(func, args, kwargs, (*inputs, *outputs), result)

    def _mark(self, name: str, args: Any, outputs: list[Tensor]) -> None:
        alive = self.live.now - self._base
        self.present.see(alive, alive + scratch_bytes(name, args, outputs), name)

    def _work(self, func: Any, args: Any, kwargs: Any, touched: tuple[Tensor, ...], result: Any) -> None:
        stage = self.present
        stage.operators += 1
        stage.traffic += sum(t.numel() * t.element_size() for t in touched)
        stage.flops += _flops(func, args, kwargs, result)
        self._count += 1
        if self._most is not None and self._count > self._most:
            raise MethodInapplicable(
                f"its slices would be so small that the call takes over {self._most:,} operators, most of them too "
                "short to be worth their start"
            )


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    if "_scaled_dot_product" in func._schema.name:
        q, k, v = args[:3]
        return float(2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
    rule = flop_registry.get(func.overloadpacket)
    return 0.0 if rule is None else float(rule(*args, **kwargs, out_val=result))


class Watch(TorchDispatchMode):
    """Writes every operator into a ledger. With `fake`, real tensors are made fake on the way: nothing is computed,
    and what asks for a value gets a constant."""

    def __init__(self, ledger: Ledger, fake: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger, self._fake = ledger, fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        if self._fake is not None:
            if func in _QUESTIONS and isinstance(args[0], FakeTensor):
                return _answer(func, args[0])
            if not all(isinstance(x, FakeTensor) for x in inputs):
                args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
                inputs = _tensors((args, kwargs))
        self._ledger.before(inputs)
        result = func(*args, **kwargs)
        self._ledger.after(func, args, kwargs, inputs, result)
        return result

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or self._fake is None:
            return tensor
        return self._fake.from_tensor(tensor)


def _answer(func: Any, tensor: Tensor) -> float | int | bool:
    """What is said of a value that nobody computed: zero, or false."""
    kind = bool if func is _QUESTIONS[1] or tensor.dtype is torch.bool else int
    return 0.0 if tensor.dtype.is_floating_point and kind is int else kind(0)
