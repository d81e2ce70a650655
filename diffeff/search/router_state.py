"""What a router's training has come to, in one file: an interrupted training goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffeff.errors import OutputError
from diffeff.files import replacing

__all__ = ["LIMIT", "RouterState"]

LIMIT = 5.0
"""Logits stay within plus and minus this (as published); the first entry's are fixed at it."""
_DECAY = 0.9
"""Of the running means of gradients and of what computing each module saves; Adam's own is the same."""
_TENSORS = ("logits", "mean", "square", "benefit", "weights")


@dataclass
class RouterState:
    """Logits [entries, modules], Adam's two moments, the running mean of the benefit of computing each module, and the
    weights of the entries; how many trajectories they have seen."""

    logits: Tensor
    mean: Tensor
    square: Tensor
    benefit: Tensor
    weights: Tensor
    done: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def fresh(cls, entries: int, modules: int, seed: int) -> RouterState:
        """Logits drawn from N(0, 1), as published; the first entry computes everything."""
        logits = torch.randn(entries, modules, generator=torch.Generator().manual_seed(seed)).clamp(-LIMIT, LIMIT)
        logits[0] = LIMIT
        mean, square, benefit = (torch.zeros_like(logits) for _ in range(3))
        return cls(logits, mean, square, benefit, torch.ones(entries))

    def step(self, gradient: Tensor, rate: float) -> None:
        """One step of Adam. Each row of the router has seen one denoiser step of the trajectory, so that one step for
        all rows after it is the same as one step for each row in it."""
        count = self.done + 1
        self.mean.lerp_(gradient, 1 - _DECAY)
        self.square.lerp_(gradient.square(), 0.001)
        mean, square = self.mean / (1 - _DECAY**count), self.square / (1 - 0.999**count)
        self.logits[1:] -= (rate * mean / (square.sqrt() + 1e-12))[1:]
        self.logits.clamp_(-LIMIT, LIMIT)

    def note_benefit(self, benefit: Tensor) -> Tensor:
        """The running mean of the benefit, with this trajectory's in it."""
        self.benefit.lerp_(benefit, 1 - _DECAY)
        return self.benefit / (1 - _DECAY ** (self.done + 1))

    def table(self, cost: Tensor, budget: float) -> list[list[bool]]:
        """The modules that are computed: the most probable ones, as many as `budget` (the sum of their `cost`) holds.

        That is the threshold 1/2 after the shift of all logits that meets the budget. The first row is all computed.
        """
        chosen = torch.zeros_like(self.logits, dtype=torch.bool)
        chosen[0] = True
        left = budget - float(cost[0].sum())
        for place in self.logits[1:].flatten().argsort(descending=True, stable=True).tolist():
            price = float(cost[1:].flatten()[place])
            if price <= left + 1e-9:
                chosen[1:].view(-1)[place] = True
                left -= price
        return [[bool(v) for v in row] for row in chosen.tolist()]

    # --- file ---------------------------------------------------------------------------------------------------
    def save(self, path: Path, subject: Mapping[str, Any]) -> None:
        """Write all of it, whole or not at all."""
        from safetensors.torch import save_file

        told = {"done": self.done, "seconds": self.seconds, "history": self.history, "subject": _digest(subject)}
        with replacing(path) as temporary:
            save_file({name: getattr(self, name) for name in _TENSORS}, temporary, {"router": json.dumps(told)})

    @classmethod
    def load(cls, path: Path, subject: Mapping[str, Any]) -> RouterState | None:
        """What `save` wrote for the same subject; None where there is no file. Raises OutputError for a file of another
        training, which it would overwrite."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["router"])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
            raise OutputError(
                f"{path} is not the state of a router's training: {error}. Choose another place."
            ) from error
        if told["subject"] != _digest(subject):
            raise OutputError(
                f"{path} holds the training of another router (other model, prompts or options). Choose another place, "
                "or delete the file to begin anew."
            )
        return cls(**tensors, done=told["done"], seconds=told["seconds"], history=told["history"])


def _digest(subject: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(subject, sort_keys=True, default=str).encode()).hexdigest()[:16]
