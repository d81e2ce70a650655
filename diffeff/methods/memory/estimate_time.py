"""Predicted time of traced work: arithmetic, traffic and calls over what this device does of each in a second.

The three rates come from a measurement of some tenths of a second, once per device and dtype. The figure is rough as a
time (no overlap, one size of matrix) and meant for ratios: the same call with and without a method.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from diffeff.methods.memory.estimate_ops import Tally

__all__ = ["Rates", "rates", "seconds_of"]

_SIDE, _BLOCK, _REPEATS = 512, 1 << 22, 5


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: floating-point operations, bytes read or written; and seconds per operator."""

    flops: float
    traffic: float
    operator: float


def seconds_of(tally: Tally, device: torch.device, dtype: torch.dtype) -> float:
    """Predicted seconds of a stage."""
    found = rates(device, dtype)
    return tally.flops / found.flops + tally.traffic / found.traffic + tally.operators * found.operator


@cache
def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the three rates."""
    side = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    block, one = (torch.ones(n, device=device, dtype=dtype) for n in (_BLOCK, 1))
    return Rates(
        flops=2.0 * _SIDE**3 / _fastest(lambda: side @ side, device),
        traffic=2.0 * block.nbytes / _fastest(block.clone, device),
        operator=_fastest(lambda: one + one, device),
    )


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    work()
    return min(_seconds(work, device) for _ in range(_REPEATS))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
