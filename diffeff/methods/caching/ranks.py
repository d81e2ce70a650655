"""One decision for all processes that share a denoiser call out among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ranks", "ranks_of"]


@dataclass(frozen=True)
class Ranks:
    """The processes of one context- or tensor-parallel group.

    Under context parallelism each sees other tokens, so that numbers measured from them differ; a rank that computes
    where another predicts waits forever in the next collective. All ranks of a group must call alike.
    """

    group: Any
    device: torch.device
    """Where the group's backend wants its tensors."""

    def largest(self, value: float | None) -> float | None:
        """The largest of the ranks' values; None, unknown, where one of them does not know (or has no number)."""
        unknown = value is None or math.isnan(value)
        told = self._reduce([math.inf if unknown else value], torch.distributed.ReduceOp.MAX)
        (found,) = told.tolist()
        return None if math.isinf(found) else float(found)

    def mean(self, values: Sequence[float]) -> tuple[float, ...]:
        """The mean over ranks of each value."""
        total = self._reduce(values, torch.distributed.ReduceOp.SUM)
        return tuple((total / torch.distributed.get_world_size(self.group)).tolist())

    def _reduce(self, values: Sequence[float | None], how: Any) -> Tensor:
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(told, op=how, group=self.group)
        return told


def ranks_of(denoiser: nn.Module) -> Ranks | None:
    """The group that shares calls of this denoiser out; None where each process works alone.

    The rule: torch.distributed is initialised, and the denoiser carries the `_parallel_config` that diffusers'
    `enable_parallelism` (or `from_pretrained(parallel_config=...)`) leaves on it, with a mesh of more than one rank.
    Processes that merely run side by side, each with prompts of its own, carry none and exchange nothing.
    """
    config = getattr(denoiser, "_parallel_config", None)
    if config is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    context, tensor = config.context_parallel_config, config.tensor_parallel_config
    mesh = context._flattened_mesh if context is not None else tensor._mesh
    if mesh.size() < 2:
        return None
    return Ranks(mesh.get_group(), config._device)
