"""How fast each kernel is beside torch's own ways, and how near to what the device can do.

Protocol: the arms of a case are warmed up and then take turns, in reversed order every other round; a time is the
median of the rounds, a ratio the median of the ratios within rounds. The ceilings, copy bandwidth and matrix product,
are measured on the same device in the same process. On devices without Triton the kernels' reference paths run, and
rows say so. Results are compared with the baseline's, so that no fast wrong answer is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffeff.errors import UnknownName, nearest
from diffeff.eval.bench.kernel_cases import CASES, OURS, Case, Place
from diffeff.eval.bench.rows import quartiles
from diffeff.eval.bench.stamp import run_stamp
from diffeff.kernels.microbench import machine, sample
from diffeff.kernels.targets import runs_triton
from diffeff.report import environment

__all__ = ["Ceilings", "KernelSettings", "measure_ceilings", "measure_kernels"]

_SAMPLE = 2e-3
"""Seconds that one sample should last at least."""
_MOVES = ("copy_", "clone", "_to_copy", "to", "contiguous", "reshape", "index_select", "gather", "index", "cat")
"""Operators whose result, where it is not a view, holds only what another tensor holds."""
Observe = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """`kernels`: some of CASES, empty for all. `full`: the sizes of real models; None means on CUDA only."""

    kernels: tuple[str, ...] = ()
    rounds: int = 15
    device: str = "cpu"
    dtype: str = "float32"
    full: bool | None = None

    def __post_init__(self) -> None:
        for name in self.kernels:
            if name not in CASES:
                raise UnknownName(f"there is no kernel {name!r} to measure. {nearest(name, CASES)}")


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: bytes read and written per second in a copy, flop/s of a matrix product."""

    bytes_per_second: float
    flop_per_second: float


def measure_ceilings(place: Place) -> Ceilings:
    """Best of several rounds of one large copy and one large square product in the dtype of the place."""
    n = 8192 if place.full else 512
    x = torch.empty(
        (1 << 29 if place.full else 1 << 24) // place.dtype.itemsize, dtype=place.dtype, device=place.device
    )
    y, a, b = torch.empty_like(x), place.noise(n, n), place.noise(n, n)
    copy, product = (_best(fn, place.device) for fn in (lambda: y.copy_(x), lambda: a @ b))
    return Ceilings(2 * x.numel() * x.element_size() / copy, 2 * n**3 / product)


def measure_kernels(
    settings: KernelSettings, observe: Observe = lambda done, total, label: None
) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per arm of each case, as soon as the case is measured. A backend that cannot take a case is
    listed with the reason."""
    device = torch.device(settings.device)
    full = device.type == "cuda" if settings.full is None else settings.full
    place = Place(device, getattr(torch, settings.dtype), full)
    names = settings.kernels or tuple(CASES)
    common = _common(place, settings) | run_stamp()
    with torch.no_grad():
        ceilings = measure_ceilings(place)
        for done, name in enumerate(names):
            observe(done, len(names), name)
            for case in CASES[name](place):
                yield from (row | common for row in _rows(case, place, ceilings, settings.rounds))
    observe(len(names), len(names), "")


def _common(place: Place, settings: KernelSettings) -> dict[str, Any]:
    return {
        "benchmark": "kernels",
        "device": place.device.type,
        "machine": machine(place.device),
        "dtype": settings.dtype,
        "rounds": settings.rounds,
        "environment": environment(),
    }


def _rows(case: Case, place: Place, ceilings: Ceilings, rounds: int) -> Iterator[dict[str, Any]]:
    outcomes = {name: _tried(arm) for name, arm in case.arms.items()}
    able = {name: arm for name, arm in case.arms.items() if isinstance(outcomes[name], Tensor)}
    seconds = _alternate(able, place.device, rounds)
    for name in case.arms:
        row = {"kernel": case.kernel, "shape": case.shape, "arm": name, "path": _path(name, place)}
        result = outcomes[name]
        if isinstance(result, str):
            yield row | {"status": "unavailable", "reason": result}
            continue
        base = outcomes[case.baseline]
        yield (
            row
            | _figures(case, seconds[name], seconds.get(case.baseline, []), ceilings)
            | {
                "status": "ok",
                "copies": _copies(case.arms[name]),
                "difference": _difference(result, base) if isinstance(base, Tensor) else None,
                "exact": case.exact,
            }
        )


def _figures(case: Case, own: list[float], base: list[float], ceilings: Ceilings) -> dict[str, Any]:
    middle = median(own)
    return {
        "milliseconds": quartiles([1e3 * s for s in own]),
        "ratio": quartiles([b / s for b, s in zip(base, own, strict=True)] if base else []),
        "gigabytes_per_second": case.bytes / middle / 1e9,
        "teraflop_per_second": case.flop / middle / 1e12,
        "of_copy": case.bytes / middle / ceilings.bytes_per_second,
        "of_matmul": case.flop / middle / ceilings.flop_per_second,
    }


def _path(arm: str, place: Place) -> str:
    """What runs under an arm's name: our Triton kernel, its reference, or torch."""
    if not arm.startswith(OURS):
        return "triton" if arm == "triton" else "torch"
    return "auto" if runs_triton(place.device) and place.device.type == "cuda" else "reference"


def _tried(arm: Callable[[], Tensor]) -> Tensor | str:
    try:
        return arm()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).splitlines()[0][:200]


def _difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))


def _copies(arm: Callable[[], Tensor]) -> int:
    """Passes of one call that only move data: copies, casts, and rows gathered into a tensor of their own."""
    seen = _Copies()
    with seen:
        arm()
    return seen.count


class _Copies(TorchDispatchMode):
    """Counts copies, inside our own registered operations too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func.namespace == "diffeff":
            first = next(x for x in tree_leaves(args) if isinstance(x, Tensor))
            key = torch._C.DispatchKey.CUDA if first.is_cuda else torch._C.DispatchKey.CPU
            with self:  # a mode is off inside its own handler
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **named)
        result = func(*args, **named)
        name = func.overloadpacket.__name__
        if name == "copy_" or (name in _MOVES and not _shares(result, args)):
            self.count += 1
        return result


def _shares(result: Any, args: Any) -> bool:
    """Whether a result is a view of an argument."""
    own = result.untyped_storage()._cdata
    return any(x.untyped_storage()._cdata == own for x in tree_leaves(args) if isinstance(x, Tensor))


# --- time -----------------------------------------------------------------------------------------------------------
def _alternate(arms: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    loops = {name: max(1, int(_SAMPLE / max(sample(arm, 1, device), 1e-7))) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            seconds[name].append(sample(arms[name], loops[name], device))
    return seconds


def _best(fn: Callable[[], object], device: torch.device) -> float:
    sample(fn, 2, device)
    return min(sample(fn, 3, device) for _ in range(7))
