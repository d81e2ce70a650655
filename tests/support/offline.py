"""Compiles the kernels that a launcher would launch, for GPUs that are not there: shared memory, spills, tensor cores.

A launcher is called with CPU tensors while `JITFunction.run` only takes notes; each note is compiled as the launch
would have been, specialised on alignment and on the value 1 as Triton does. Not for processes with TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

__all__ = ["TARGETS", "Built", "Launch", "build", "launches"]

TARGETS = (80, 90, 100)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch for one GPU generation."""

    name: str
    target: int
    shared: int
    ptx: str

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_BYTES[self.target]

    @property
    def tensor_cores(self) -> bool:
        return any(word in self.ptx for word in ("wgmma", "mma.sync", "tcgen05.mma"))


@contextmanager
def _noting(notes: list[Launch]) -> Iterator[None]:
    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        notes.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    before, JITFunction.run = JITFunction.run, note
    try:
        yield
    finally:
        JITFunction.run = before


def launches(call: Callable[[], object]) -> list[Launch]:
    """The kernels that `call` launches; nothing runs."""
    notes: list[Launch] = []
    with _noting(notes):
        call()
    return notes


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def build(launch: Launch, target: int) -> Built:
    """The launch compiled for compute capability `target` (80: Ampere, 90: Hopper, 100: Blackwell)."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    fixed = {p.name for p in launch.kernel.params if p.is_constexpr}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if name in fixed or one or value is None:
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = _kind(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    return Built(launch.kernel.__name__, target, built.metadata.shared, built.asm["ptx"])
