"""`predict` in one kernel: every snapshot is read once, the sum stays in registers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffeff.kernels.targets import on_device

__all__ = ["MAX_SNAPSHOTS", "predict_triton"]

MAX_SNAPSHOTS = 6
_BLOCK = 1024


@triton.jit
def _weighted_sum(out, x0, x1, x2, x3, x4, x5, w0, w1, w2, w3, w4, w5, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32) * w0
    if COUNT > 1:
        total += tl.load(x1 + at, mask=inside, other=0.0).to(tl.float32) * w1
    if COUNT > 2:
        total += tl.load(x2 + at, mask=inside, other=0.0).to(tl.float32) * w2
    if COUNT > 3:
        total += tl.load(x3 + at, mask=inside, other=0.0).to(tl.float32) * w3
    if COUNT > 4:
        total += tl.load(x4 + at, mask=inside, other=0.0).to(tl.float32) * w4
    if COUNT > 5:
        total += tl.load(x5 + at, mask=inside, other=0.0).to(tl.float32) * w5
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def predict_triton(snapshots: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of up to `MAX_SNAPSHOTS` dense snapshots of one layout, in that layout."""
    out = torch.empty_like(snapshots[0])
    if not out.numel():
        return out
    more = MAX_SNAPSHOTS - len(snapshots)
    grid = (triton.cdiv(out.numel(), _BLOCK),)
    with on_device(out.device):
        _weighted_sum[grid](
            out, *snapshots, *([out] * more), *map(float, weights), *([0.0] * more), out.numel(),
            COUNT=len(snapshots), BLOCK=_BLOCK,
        )  # fmt: skip
    return out
