"""Token matching without the matrix of scores, and merging without atomics.

`_match` keeps the best score and index of each row in registers while it goes over the other side. `_merge` has one
program per group and slice of channels, which adds the group's members in order: the same bits at every call.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffeff.kernels.targets import interpreting, on_device
from diffeff.kernels.token_match.reference import Groups, key_terms, row_terms

__all__ = ["match_triton", "merge_triton"]


@triton.jit
def _match(
    a, b, factor, shift, score, index, n, m, channels, ab, an, bb, bn,
    UPCAST: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    slices = tl.cdiv(n, BM)
    batch = (tl.program_id(0) // slices).to(tl.int64)
    i = (tl.program_id(0) % slices * BM + tl.arange(0, BM)).to(tl.int64)
    best = tl.full([BM], float("-inf"), dtype=tl.float32)
    where = tl.zeros([BM], dtype=tl.int32)
    for first in range(0, m, BN):
        j = (first + tl.arange(0, BN)).to(tl.int64)
        dots = tl.zeros([BM, BN], dtype=tl.float32)
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            left = tl.load(
                a + batch * ab + i[:, None] * an + c[None, :],
                mask=(i[:, None] < n) & (c[None, :] < channels),
                other=0.0,
            )
            right = tl.load(
                b + batch * bb + j[None, :] * bn + c[:, None],
                mask=(j[None, :] < m) & (c[:, None] < channels),
                other=0.0,
            )
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            dots += tl.dot(left, right, input_precision="ieee" if EXACT else "tf32")
        scale = tl.load(factor + batch * m + j, mask=j < m, other=0.0)
        extra = tl.load(shift + batch * m + j, mask=j < m, other=0.0)
        found = tl.where(j[None, :] < m, dots * scale[None, :] + extra[None, :], float("-inf"))
        top, at = tl.max(found, axis=1, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(top > best, first + at, where)  # only a better score: of equal ones the first stays
        best = tl.maximum(best, top)
    tl.store(score + batch * n + i, best, mask=i < n)
    tl.store(index + batch * n + i, where.to(tl.int64), mask=i < n)


@triton.jit
def _merge(x, out, order, start, n, count, channels, xb, xn, BLOCK: tl.constexpr):
    parts = tl.cdiv(channels, BLOCK)
    which = (tl.program_id(0) // parts).to(tl.int64)
    batch, group = which // count, which % count
    c = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(start + batch * (count + 1) + group)
    last = tl.load(start + batch * (count + 1) + group + 1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for member in range(first, last):
        token = tl.load(order + batch * n + member)
        total += tl.load(x + batch * xb + token * xn + c, mask=c < channels, other=0.0).to(tl.float32)
    total /= tl.maximum(last - first, 1).to(tl.float32)
    tl.store(out + which * channels + c, total.to(out.dtype.element_ty), mask=c < channels)


def match_triton(a: Tensor, b: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Best score (float32) and index (int64) of each row of a [B, N, C] among the rows of b [B, M, C]."""
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    (rows, n, channels), m = a.shape, b.shape[1]
    score = torch.empty(rows, n, dtype=torch.float32, device=a.device)
    index = torch.empty(rows, n, dtype=torch.int64, device=a.device)
    if not score.numel():
        return score, index
    factor, shift = (x.contiguous() for x in key_terms(b, metric))
    exact = a.dtype is torch.float32
    bm, bc = (64, 32) if exact else (128, 64)
    with on_device(a.device):
        _match[(rows * triton.cdiv(n, bm),)](
            a, b, factor, shift, score, index, n, m, channels, *a.stride()[:2], *b.stride()[:2],
            UPCAST=interpreting(), EXACT=exact, BM=bm, BN=64 if exact else 128, BC=bc, num_warps=8, num_stages=3,
        )  # fmt: skip
    return row_terms(score, a, metric), index


def merge_triton(x: Tensor, groups: Groups) -> Tensor:
    """[B, count, C], the mean of each group of x [B, N, C]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, n, channels = x.shape
    out = torch.empty(rows, groups.count, channels, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    block = min(1024, max(16, triton.next_power_of_2(channels)))
    with on_device(x.device):
        _merge[(rows * groups.count * triton.cdiv(channels, block),)](
            x, out, groups.order, groups.start, n, groups.count, channels, *x.stride()[:2], BLOCK=block, num_warps=4
        )
    return out
