"""How much a stretch of work computes: matrix products, convolutions and attention, counted as they are dispatched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["Flops", "counting_flops"]


@dataclass
class Flops:
    """Floating-point operations so far, two per multiply-accumulate."""

    count: int = 0


@contextmanager
def counting_flops(modules: Iterable[nn.Module]) -> Iterator[Flops]:
    """Count what calls of `modules` compute while the block runs, with torch's own counter and the operators it does
    not know.

    Attention is counted, also where token merging or a cache makes it smaller. Integer products (int8 layers) count
    like floating-point ones of their shape, also where a kernel is launched past torch's dispatcher (Triton): the
    figure says how much is computed, not how fast. Each operator costs microseconds more: do not time such a run.
    """
    flops, modules = Flops(), list(modules)
    with FlopCounterMode(display=False, custom_mapping=_others()) as counter:

        def begin(*_: Any) -> None:
            flops.count -= counter.get_total_flops()

        def end(*_: Any) -> None:
            flops.count += counter.get_total_flops()

        hooks = [hook for module in modules for hook in _around(module, begin, end)]
        hooks += [hook for layer in _stand_ins(modules) for hook in _by_features(layer, counter, flops)]
        try:
            yield flops
        finally:
            for hook in hooks:
                hook.remove()


def _around(module: nn.Module, begin: Callable[..., None], end: Callable[..., None]) -> Iterator[Any]:
    yield module.register_forward_pre_hook(begin)
    yield module.register_forward_hook(end, always_call=True)


def _stand_ins(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Layers that stand in for linear ones. A LoRA wrapper has features, too: its inner layers count."""
    layers = {id(layer): layer for module in modules for layer in module.modules()}
    for layer in layers.values():
        leaf = next(layer.children(), None) is None and not isinstance(layer, nn.Linear)
        if leaf and isinstance(getattr(layer, "in_features", None), int) and hasattr(layer, "out_features"):
            yield layer


def _by_features(layer: Any, counter: FlopCounterMode, flops: Flops) -> Iterator[Any]:
    """Count a stand-in by its features and not by what the counter saw of its call: nothing of a Triton kernel, and too
    much where kernels are tried out first."""
    before = 0

    def begin(*_: Any) -> None:
        nonlocal before
        before = counter.get_total_flops()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            flops.count += 2 * output.numel() * layer.in_features - (counter.get_total_flops() - before)

    yield layer.register_forward_pre_hook(begin)
    yield layer.register_forward_hook(end)


def _others() -> dict[Any, Callable[..., int]]:
    """Operators that torch's counter leaves out; its formulas are called with shapes in place of tensors."""
    ops = torch.ops
    return {
        ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        ops.aten._int_mm: _product,
        ops.quantized.linear_dynamic: _packed,
    }


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _product(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(a[0] * a[1] * b[1])


def _packed(x: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(x)) * int(out_shape[-1])
