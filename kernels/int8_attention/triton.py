"""`int8_attention_qk`: scores from int8 products, softmax and values in float, one pass over keys."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffeff.kernels.int8_attention.reference import KEY_BLOCK, QUERY_BLOCK, mean_term, quantise_blocks, smooth_keys
from diffeff.kernels.targets import interpreting, on_device

__all__ = ["int8_attention_triton"]


@triton.jit
def _attend(
    q, k, sq, sk, v, out, lse, heads, nq, nk, d, dv, scale, vb, vh, vn, ob, oh, on,
    UPCAST: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    slices = tl.cdiv(nq, BM)
    block = tl.program_id(0) % slices
    which = (tl.program_id(0) // slices).to(tl.int64)
    batch, head = which // heads, which % heads
    i = block * BM + tl.arange(0, BM)
    c, cv = tl.arange(0, BD), tl.arange(0, BV)
    inside = (i[:, None] < nq) & (c[None, :] < d)
    query = tl.load(q + (which * nq + i[:, None]) * d + c[None, :], mask=inside, other=0)
    factor = tl.load(sq + which * slices + block) * scale * 1.4426950408889634
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    sums = tl.zeros([BM, BV], dtype=tl.float32)
    for step in range(tl.cdiv(nk, BN)):
        j = step * BN + tl.arange(0, BN)
        key_inside = (j[None, :] < nk) & (c[:, None] < d)
        key = tl.load(k + (which * nk + j[None, :]) * d + c[:, None], mask=key_inside, other=0)
        value_at = batch * vb + head * vh + j[:, None].to(tl.int64) * vn + cv[None, :]
        value = tl.load(v + value_at, mask=(j[:, None] < nk) & (cv[None, :] < dv), other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        product = tl.dot(query, key, out_dtype=tl.int32).to(tl.float32)
        score = product * (factor * tl.load(sk + which * tl.cdiv(nk, BN) + step))
        score = tl.where(j[None, :] < nk, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        weighted = tl.dot(p.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
        sums = sums * shrink[:, None] + weighted
        top = higher
    at = batch * ob + head * oh + i[:, None].to(tl.int64) * on + cv[None, :]
    result = sums / total[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(i[:, None] < nq) & (cv[None, :] < dv))
    tl.store(lse + which * nq + i, (top + tl.log2(total)) * 0.6931471805599453, mask=i < nq)


def int8_attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] (memory laid out [B, N, H, D]) and float32 lse [B, H, N]."""
    v = v if v.stride(-1) == 1 else v.contiguous()
    b, h, n, d = q.shape
    out = torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h, n, device=q.device)
    if not lse.numel():
        return out, lse
    keys, mean = smooth_keys(k) if smooth else (k, None)
    (qi, sq), (ki, sk) = quantise_blocks(q, QUERY_BLOCK), quantise_blocks(keys, KEY_BLOCK)
    wide = d > 64 or q.element_size() > 2
    with on_device(q.device):
        _attend[(triton.cdiv(n, QUERY_BLOCK) * b * h,)](
            qi, ki, sq, sk, v, out, lse, h, n, k.shape[2], d, v.shape[-1], scale, *v.stride()[:3], *out.stride()[:3],
            UPCAST=interpreting(), EXACT=q.dtype is torch.float32, BM=QUERY_BLOCK, BN=KEY_BLOCK,
            BD=max(32, triton.next_power_of_2(d)), BV=max(16, triton.next_power_of_2(v.shape[-1])),
            num_warps=8 if wide else 4, num_stages=2 if wide else 3,
        )  # fmt: skip
    return out, lse if mean is None else lse + mean_term(q, mean, scale)
