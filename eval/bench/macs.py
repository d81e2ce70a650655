"""How much a run computes: the multiply-accumulates of its linear and convolution layers, counted by hooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Macs", "counting"]


@dataclass
class Macs:
    """Multiply-accumulates so far."""

    count: int = 0


@contextmanager
def counting(modules: Iterable[nn.Module]) -> Iterator[Macs]:
    """Count what the linear and convolution layers inside `modules` compute while the block runs.

    Products inside attention are not counted. Layers that stand in for linear ones (int8) count by their features. The
    hooks cost time: a run inside the block must not be timed.
    """
    macs = Macs()
    layers = {id(layer): layer for module in modules for layer in module.modules()}
    hooks = [
        layer.register_forward_hook(_hook(macs, size)) for layer in layers.values() if (size := _per_output(layer))
    ]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()


def _hook(macs: Macs, per_output: int) -> Any:
    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            macs.count += output.numel() * per_output

    return count


def _per_output(layer: nn.Module) -> int:
    """Multiply-accumulates per output number; 0 for layers that are not counted."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    features = getattr(layer, "in_features", None)
    leaf = next(layer.children(), None) is None  # a LoRA wrapper has features, too: its inner layers are counted
    return features if leaf and isinstance(features, int) and hasattr(layer, "out_features") else 0
