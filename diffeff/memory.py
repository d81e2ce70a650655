"""Memory of a device: the peak of a stretch of work, what is held now, and what is free.

CUDA: allocated bytes. MPS: what the driver has given, which does not shrink during a run. CPU: the resident set of the
process (Linux). None where the system does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "available_bytes", "held_bytes", "peak_memory"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_INFO = Path("/proc/meminfo")


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
    if device.type == "mps":
        torch.mps.empty_cache()
        yield peak
        peak.bytes = torch.mps.driver_allocated_memory()
        return
    fresh = _reset_high_water()
    yield peak
    peak.bytes = _kilobytes(_STATUS, "VmHWM:") if fresh else None


def held_bytes(device: torch.device) -> int | None:
    """What is held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _kilobytes(_STATUS, "VmRSS:")


def available_bytes(device: torch.device) -> int | None:
    """What could still be taken: free memory of the device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - torch.mps.driver_allocated_memory()
    return _kilobytes(_INFO, "MemAvailable:")


def _reset_high_water() -> bool:
    try:
        _CLEAR.write_text("5")  # Linux: resets VmHWM to the present resident set
    except OSError:
        return False
    return True


def _kilobytes(file: Path, key: str) -> int | None:
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None
