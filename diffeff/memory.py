"""Peak memory of a stretch of work: allocated bytes on CUDA and MPS, resident set of the process elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "peak_memory"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Peak:
    """Filled when the block ends; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the most memory held inside the block."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    fresh = _reset_high_water()
    yield peak
    peak.bytes = _high_water() if fresh else None


def _reset_high_water() -> bool:
    try:
        _CLEAR.write_text("5")  # Linux: resets VmHWM to the present resident set
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
