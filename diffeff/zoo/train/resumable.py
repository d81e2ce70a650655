"""Networks in training with their optimisers and averages: stepped together, saved together, and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffeff.zoo.train.harness import EMA, load_checkpoint, save_checkpoint
from diffeff.zoo.train.latents import Optimisers

__all__ = ["Resumable"]


class Resumable:
    """`networks` by their names in the checkpoint at `path`, which is read at once if there is one and `resume`.

    `elapsed` are the minutes that earlier runs took. `muon`, `adam` and `edges` are those of `Optimisers`, `decay`
    that of the averages.
    """

    def __init__(
        self,
        path: Path,
        networks: Mapping[str, Any],
        *,
        muon: float,
        adam: float,
        edges: tuple[str, ...],
        decay: float,
        resume: bool,
    ) -> None:
        self.path, self.networks, self.elapsed = path, networks, 0.0
        self.optimisers = Optimisers(networks.values(), muon=muon, adam=adam, edges=edges)
        self.ema = EMA(*networks.values(), decay=decay)
        saved = load_checkpoint(path) if resume else None
        if saved is not None:
            self._load(saved)

    def _load(self, saved: Mapping[str, Any]) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(saved[name])
        self.ema.load_state_dict(saved["ema"])
        self.optimisers.load_state_dict(saved["optimisers"])
        self.elapsed = float(saved["elapsed"])

    def step(self, loss: Tensor, factor: float) -> None:
        """Descend by the gradient of `loss` at `factor` times the base rates, and move the averages."""
        loss.backward()
        self.optimisers.step(factor)
        self.ema.update()

    def save(self, elapsed: float) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {name: network.state_dict() for name, network in self.networks.items()}
        state |= {"ema": self.ema.state_dict(), "optimisers": self.optimisers.state_dict(), "elapsed": elapsed}
        save_checkpoint(self.path, state)
