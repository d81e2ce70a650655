"""What a denoiser really does in a pipeline run, written down by plain hooks that know nothing of any anatomy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Call", "Kernel", "Watch", "named_arguments", "watching"]


@dataclass
class Kernel:
    """One scaled_dot_product_attention: the innermost watched module it ran in, and its q and k."""

    inside: str
    q: Tensor
    k: Tensor


@dataclass
class Call:
    """One call of a module: what went in and what came out, the very objects."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    blocks: list[Call] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


@dataclass
class Watch:
    """All calls of the denoiser, and how often the scheduler stepped."""

    calls: list[Call] = field(default_factory=list)
    updates: int = 0


def named_arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    """The call's arguments by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


class _Kernels(TorchFunctionMode):
    def __init__(self, note: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = (args + tuple((kwargs or {}).values()))[:2]
            self.note(q, k)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(
    denoiser: nn.Module, blocks: Iterable[tuple[str, nn.Module]], inner: Iterable[tuple[str, nn.Module]] = ()
) -> Iterator[Watch]:
    """Hooks on the denoiser, on its blocks, and on the modules (`inner`) that kernels are attributed to."""
    watch, open_calls, names = Watch(), [], [""]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(name, args, dict(kwargs))
            (open_calls[-1].blocks if open_calls else watch.calls).append(call)
            open_calls.append(call)

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        open_calls.pop().result = result

    def note(q: Tensor, k: Tensor) -> None:
        if open_calls:
            open_calls[-1].kernels.append(Kernel(names[-1], q, k))

    with ExitStack() as stack:
        for name, module in [("", denoiser), *blocks]:
            stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        for name, module in inner:
            stack.callback(module.register_forward_pre_hook(lambda *_, n=name: names.append(n)).remove)
            stack.callback(module.register_forward_hook(lambda *_: names.pop() and None).remove)
        stack.enter_context(_Kernels(note))
        yield watch
