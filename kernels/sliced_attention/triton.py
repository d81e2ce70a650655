"""`sliced_attention` in one kernel: a slice of queries per program, one pass over its keys, online softmax.

Keys and values are read through an index, so that no compacted copy of them exists; blocks of keys that a list leaves
out are never touched; biases are read in place, broadcast by strides of zero. Block pointers are avoided (gone in
newer Triton), and so are bf16 products under the interpreter, which gets them wrong.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffeff.kernels.sliced_attention.reference import Extras
from diffeff.kernels.targets import interpreting, on_device

__all__ = ["sliced_attention_triton"]


@triton.jit
def _attend(
    q, k, v, out, lse, index, size, bias, offsets, blocks, heads, nq, nk, d, dv, scale,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, ib, sb, bb, bh, bi, bj, lists,
    GATHER: tl.constexpr, SIZE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, SPARSE: tl.constexpr,
    UPCAST: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    slices = tl.cdiv(nq, BM)
    block = tl.program_id(0) % slices
    batch, head = (tl.program_id(0) // slices // heads).to(tl.int64), (tl.program_id(0) // slices % heads).to(tl.int64)
    i = (block * BM + tl.arange(0, BM)).to(tl.int64)
    c, cv = tl.arange(0, BD), tl.arange(0, BV)
    query_at = batch * qb + head * qh + i[:, None] * qn + c[None, :]
    query = tl.load(q + query_at, mask=(i[:, None] < nq) & (c[None, :] < d), other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    sums = tl.zeros([BM, BV], dtype=tl.float32)
    first, last = 0, tl.cdiv(nk, BN)
    if SPARSE:
        row = offsets + head * lists + block
        first, last = tl.load(row), tl.load(row + 1)
    for step in range(first, last):
        number = step
        if SPARSE:
            number = tl.load(blocks + step)
        j = (number * BN + tl.arange(0, BN)).to(tl.int64)
        seen = j < nk
        n = j
        if GATHER:
            n = tl.load(index + batch * ib + j, mask=seen, other=0).to(tl.int64)
        key_at = batch * kb + head * kh + n[None, :] * kn + c[:, None]
        key = tl.load(k + key_at, mask=seen[None, :] & (c[:, None] < d), other=0.0)
        value_at = batch * vb + head * vh + n[:, None] * vn + cv[None, :]
        value = tl.load(v + value_at, mask=seen[:, None] & (cv[None, :] < dv), other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        # scores in units of log 2, so that exp2 serves
        score = tl.dot(query, key, input_precision="ieee" if EXACT else "tf32") * (scale * 1.4426950408889634)
        if SIZE:
            extra = tl.load(size + batch * sb + j, mask=seen, other=0.0)
            score += extra[None, :] * 1.4426950408889634
        if BIAS:
            bias_at = batch * bb + head * bh + i[:, None] * bi + j[None, :] * bj
            added = tl.load(bias + bias_at, mask=(i[:, None] < nq) & seen[None, :], other=0.0)
            if MASK:
                score = tl.where(added != 0, score, float("-inf"))
            else:
                score += added.to(tl.float32) * 1.4426950408889634
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: exp2(-inf) = 0
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        product = tl.dot(p.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
        sums = sums * shrink[:, None] + product
        top = higher
    total = tl.where(total == 0.0, 1.0, total)
    result = sums / total[:, None]
    out_at = batch * ob + head * oh + i[:, None] * on + cv[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=(i[:, None] < nq) & (cv[None, :] < dv))
    tl.store(lse + (batch * heads + head) * nq + i, (top + tl.log2(total)) * 0.6931471805599453, mask=i < nq)


def sliced_attention_triton(q: Tensor, k: Tensor, v: Tensor, extras: Extras, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] (memory laid out [B, N, H, D]) and float32 lse; operands in any strides with contiguous
    channels (others are copied)."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, h, n, d = q.shape
    out = torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    keys = k.shape[2] if extras.key_index is None else extras.key_index.shape[-1]
    tiles = _tiles(q, max(d, v.shape[-1]), extras)
    arrays, strides, flags = _operands(q, extras, (b, h, n, keys))
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *strides]
    with on_device(q.device):
        _attend[(triton.cdiv(n, tiles["BM"]) * b * h,)](
            q, k, v, out, lse, *arrays, h, n, keys, d, v.shape[-1], scale, *strides, **flags, UPCAST=interpreting(),
            EXACT=q.dtype is torch.float32, BD=_power(d), BV=_power(v.shape[-1]), **tiles,
        )  # fmt: skip
    return out, lse


def _operands(
    q: Tensor, extras: Extras, shape: tuple[int, int, int, int]
) -> tuple[list[Tensor], list[int], dict[str, bool]]:
    """The optional operands, their strides, and which are there; q stands in for those that are not."""
    index, size, bias, blocks = extras.key_index, extras.key_logsize, extras.bias, extras.blocks
    wide = None if bias is None else bias.expand(shape)
    arrays = [q if x is None else x for x in (index, size, wide)]
    arrays += [q, q] if blocks is None else [blocks.offsets, blocks.blocks]
    strides = [0 if x is None or x.ndim == 1 else x.stride(0) for x in (index, size)]
    strides += [0, 0, 0, 0] if wide is None else [*wide.stride()]
    strides += [0 if blocks is None or len(blocks.offsets) == 1 else blocks.offsets.stride(0)]
    flags = {
        "GATHER": index is not None,
        "SIZE": size is not None,
        "BIAS": bias is not None,
        "MASK": bias is not None and bias.dtype is torch.bool,
        "SPARSE": blocks is not None,
    }
    return arrays, strides, flags


def _tiles(q: Tensor, d: int, extras: Extras) -> dict[str, Any]:
    """Tile sizes by the padded width of a head; a block list brings its own."""
    wide = _power(d) * q.element_size()
    bm, bn, warps, stages = (128, 64, 4, 3) if wide <= 128 else (128, 64, 8, 2) if wide <= 256 else (64, 32, 4, 2)
    if extras.blocks is not None:
        bm, bn = extras.blocks.query_block, extras.blocks.key_block
    return {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}


def _power(n: int) -> int:
    return max(16, int(triton.next_power_of_2(n)))
