"""Batches whose rows can be compared bit for bit with the same rows alone.

with RowByRow():
    together = pipe(**rows_of("wan", pipe, (0, 1, 2, 3)))
    alone = pipe(**rows_of("wan", pipe, (2,)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tiny import call_kwargs
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["RowByRow", "rows_of"]

_BATCH = 4
_PAIRED = {F.scaled_dot_product_attention, torch.matmul, torch.bmm, Tensor.matmul}
"""All their tensors have rows; of the others only the first has."""
_APART = {*_PAIRED, F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm, F.gelu, F.silu}


class RowByRow(TorchFunctionMode):
    """Computes products, convolutions and norms one row at a time: torch's kernels round differently at another number
    of rows, so that without this not even plain diffusers gives a row of a batch what it gives the row alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        values = [*args, *named.values()]
        count = values[0].shape[0] if func in _APART and values[0].ndim else 1
        if count == 1:
            return func(*args, **named)
        taken = len(values) if func in _PAIRED else 1

        def row(i: int) -> Tensor:
            cut = [_row(v, i, count) if n < taken else v for n, v in enumerate(values)]
            found: Tensor = func(*cut[: len(args)], **dict(zip(named, cut[len(args) :], strict=True)))
            return found

        return torch.cat([row(i) for i in range(count)])


def _row(value: Any, index: int, count: int) -> Any:
    own = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == count
    return value[index : index + 1] if own else value


def rows_of(family: str, pipe: Any, rows: Sequence[int], **options: Any) -> dict[str, Any]:
    """The call on some rows of one batch of four, each with its own prompt and its own seed."""
    kwargs = call_kwargs(family, pipe, batch=_BATCH, **options)
    chosen = {k: v[list(rows)] if isinstance(v, Tensor) and v.shape[0] == _BATCH else v for k, v in kwargs.items()}
    return chosen | {"generator": [torch.Generator().manual_seed(100 + row) for row in rows]}
