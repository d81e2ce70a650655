"""Where a cache's snapshots wait between steps: on the device up to a number of bytes, the rest in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffeff.methods.caching.track import Snapshot, Tensors

__all__ = ["HostMemory", "Shelf", "Vault"]


class Shelf(Protocol):
    """Memory other than the device's."""

    def takes(self, x: Tensor) -> bool:
        """Whether putting `x` there frees memory of its device."""

    def put(self, x: Tensor) -> Tensor:
        """A copy of `x` there."""

    def back(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy on `device` of what `put` gave."""


class HostMemory:
    """The host's memory, pinned for CUDA: neither way makes the host wait, and the stream keeps the order."""

    def takes(self, x: Tensor) -> bool:
        """Tensors of any device but the host itself."""
        return x.device.type not in ("cpu", "meta")

    def put(self, x: Tensor) -> Tensor:
        """Pinned where the device is CUDA; elsewhere an ordinary copy, which waits."""
        if x.device.type != "cuda":
            return x.to("cpu")
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return kept.copy_(x, non_blocking=True)

    def back(self, x: Tensor, device: torch.device) -> Tensor:
        """On `device`, in the order of its stream."""
        return x.to(device, non_blocking=x.is_pinned())


@dataclass
class Vault:
    """Holds the snapshots of one cache within `budget` bytes of device memory.

    Where they exceed it, the oldest go to the `shelf`; what later takes the place of such a one goes there at once, so
    that no snapshot is moved only because others were renewed. What is on the shelf stays there: it is copied to the
    device each time it is used, and the copy dropped, so the most that is held is the budget and the snapshots in use.
    What indicators compare (`fixed`) is needed at every step and counts, but is never moved.
    """

    budget: int
    shelf: Shelf = field(default_factory=HostMemory)
    fixed: dict[int, int] = field(default_factory=dict)
    """Bytes besides snapshots, by owner."""
    on_device: int = 0
    offloaded: int = 0
    peak_on_device: int = 0
    peak_offloaded: int = 0
    moved_out: int = 0
    brought_back: int = 0
    _here: dict[int, Snapshot] = field(default_factory=dict)
    """Snapshots on the device, the oldest first."""
    _away: dict[int, torch.device] = field(default_factory=dict)
    """Where those on the shelf came from."""

    def add(self, new: Snapshot, instead_of: Snapshot | None = None) -> None:
        """Take a snapshot in, and forget the one it replaces."""
        absent = instead_of is not None and self._forget(instead_of)
        new.tensors = tuple(None if x is None else _own(x) for x in new.tensors)
        self._here[id(new)] = new
        self.on_device += new.bytes_held()
        if absent:
            self._send(new)

    def settle(self, owner: object, fixed: Callable[[], int]) -> None:
        """Send snapshots away, the oldest first, until the budget is kept or nothing is left that could go. `fixed`
        says what `owner` holds besides: more, once a snapshot it shares tensors with has gone."""
        for snapshot in [None, *self._here.values()]:
            if snapshot is not None:
                self._send(snapshot)
            self.fixed[id(owner)] = fixed()
            held = self.on_device + sum(self.fixed.values())
            if held <= self.budget:
                break
        self.peak_on_device = max(self.peak_on_device, held)
        self.peak_offloaded = max(self.peak_offloaded, self.offloaded)

    def fetch(self, snapshot: Snapshot) -> Tensors:
        """The snapshot's tensors on their device."""
        device = self._away.get(id(snapshot))
        if device is None:
            return snapshot.tensors
        self.brought_back += 1
        return tuple(None if x is None else self.shelf.back(x, device) for x in snapshot.tensors)

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot is on the device."""
        return id(snapshot) not in self._away

    def _send(self, snapshot: Snapshot) -> None:
        present = [x for x in snapshot.tensors if x is not None]
        if not present or not all(self.shelf.takes(x) for x in present):
            return
        self._away[id(snapshot)] = present[0].device
        del self._here[id(snapshot)]
        snapshot.tensors = tuple(None if x is None else self.shelf.put(x) for x in snapshot.tensors)
        self.on_device -= snapshot.bytes_held()
        self.offloaded += snapshot.bytes_held()
        self.moved_out += 1

    def _forget(self, snapshot: Snapshot) -> bool:
        """Whether it was on the shelf."""
        if self._here.pop(id(snapshot), None) is not None:
            self.on_device -= snapshot.bytes_held()
        away = self._away.pop(id(snapshot), None) is not None
        self.offloaded -= snapshot.bytes_held() if away else 0
        return away

    # --- report -------------------------------------------------------------------------------------------------
    def to_dict(self) -> Mapping[str, Any]:
        """Peaks in bytes, and how many snapshots were moved."""
        return {
            "budget": self.budget,
            "on_device": self.peak_on_device,
            "offloaded": self.peak_offloaded,
            "moved_out": self.moved_out,
            "brought_back": self.brought_back,
        }

    @property
    def excess(self) -> str:
        """Why the budget was not kept; empty where it was."""
        if self.peak_on_device <= self.budget:
            return ""
        why = "they are in host memory already" if not self.moved_out else "indicators compare it at every step"
        return (
            f"it held {self.peak_on_device} bytes against a cache_memory of {self.budget}, and what was left could not "
            f"be moved: {why}. Nothing was dropped. Use a cache that holds less: site='step', or a predictor of fewer "
            "snapshots"
        )


def _own(x: Tensor) -> Tensor:
    """A tensor that keeps no memory but its own: a few rows of a larger one would keep all of it."""
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone()
