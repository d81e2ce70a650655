"""`int8_linear` on CUDA in two kernels: quantise the rows, then multiply, rescale and add the bias in one pass.

Against `torch._int_mm` it saves the int32 product's round trip through memory and takes any shape. Block pointers and
bf16 dots are avoided (gone, or wrong, in parts of Triton and its interpreter).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["int8_linear_triton"]

_ROUND = 12582912.0
"""1.5 * 2**23: adding and subtracting it rounds a small float32 to an integer, half to even."""


@triton.jit
def _quantise_rows(x, q, s, k, stride, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(x + row * stride + at, mask=at < k, other=0.0).to(tl.float32))
        # the maximum drops NaN: carried on by hand, so that a bad row stays visible
        top = tl.where(value == value, tl.maximum(top, value), float("inf"))
    scale = tl.maximum(tl.max(top, axis=0), 1e-30) / 127.0
    tl.store(s + row, scale)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + at, mask=at < k, other=0.0).to(tl.float32) / scale
        tl.store(q + row * k + at, ((value + ROUND) - ROUND).to(tl.int8), mask=at < k)


@triton.jit
def _matmul(
    q, w, sx, sw, bias, y, m, n, k, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], dtype=tl.int32)
    for start in range(0, k, BK):
        at = start + tl.arange(0, BK)
        a = tl.load(q + rows[:, None] * k + at[None, :], mask=(rows[:, None] < m) & (at[None, :] < k), other=0)
        b = tl.load(w + cols[None, :] * k + at[:, None], mask=(cols[None, :] < n) & (at[:, None] < k), other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    left = tl.load(sx + rows, mask=rows < m, other=0.0)
    right = tl.load(sw + cols, mask=cols < n, other=0.0)
    out = total.to(tl.float32) * left[:, None] * right[None, :]
    if HAS_BIAS:
        out += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    tl.store(y + rows[:, None] * n + cols[None, :], out.to(y.dtype.element_ty), mask=inside)


def int8_linear_triton(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] of `x` [M, K] with one dynamic scale per token; see `reference`. Any M, K, N.

    Needs a CUDA device, or TRITON_INTERPRET=1 set before triton is first imported (slow, for tests).
    """
    x, qweight = x.contiguous(), qweight.contiguous()
    (m, k), n = x.shape, len(qweight)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    sx = torch.empty(m, dtype=torch.float32, device=x.device)
    _quantise_rows[(m,)](x, q, sx, k, x.stride(0), BLOCK=min(1024, triton.next_power_of_2(max(k, 16))), ROUND=_ROUND)
    grid, blocks = _tiles(m, n)
    _matmul[grid](
        q, qweight, sx, scale, scale if bias is None else bias, y, m, n, k, HAS_BIAS=bias is not None, **blocks
    )
    return y


def _tiles(m: int, n: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Launch grid and tile sizes: wide tiles for many tokens, flat ones for a handful."""
    bm = 128 if m > 64 else (64 if m > 16 else 16)
    bn = 128
    stages = {"num_warps": 8 if bm == 128 else 4, "num_stages": 3}
    return (triton.cdiv(m, bm), triton.cdiv(n, bn)), {"BM": bm, "BN": bn, "BK": 64, **stages}
