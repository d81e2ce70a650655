"""Peak memory of an arm, in a process that has done nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffeff.memory import available_bytes, held_bytes, peak_memory

__all__ = ["Memory", "available_bytes", "held_bytes", "measured"]


@dataclass
class Memory:
    """`bytes`: the most that was held; `above_load_bytes`: beyond what the loaded model held before the call."""

    bytes: int | None = None
    above_load_bytes: int | None = None
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; all None where the system does not tell."""
        return asdict(self)


@contextmanager
def measured(device: torch.device) -> Iterator[Memory]:
    """The peak inside the block: allocated bytes on CUDA, resident set of the process on the CPU (Linux only)."""
    memory = Memory()
    before = held_bytes(device)
    with peak_memory(device) as peak:
        yield memory
    memory.bytes = peak.bytes
    if peak.bytes is not None and before is not None:
        memory.above_load_bytes = peak.bytes - before
    memory.how = f"{'allocated on CUDA' if device.type == 'cuda' else 'resident set'}, one call in a fresh process"
