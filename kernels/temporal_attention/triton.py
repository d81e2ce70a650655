"""`temporal_attention` in one kernel: a few (position, head) pairs per program, all frames in registers.

A whole sequence of up to 32 frames fits into one tile, so there is no loop over keys and no online softmax, only two
batched products. Pairs run along heads first: with contiguous heads a program reads whole token rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffeff.kernels.targets import dense_like, interpreting, on_device

__all__ = ["temporal_attention_triton"]

_TILE = 1 << 13
"""Elements of the query tile of one program: 8 pairs of 16 frames by 64 channels."""
_LOG2E = 1.4426950408889634


@triton.jit
def _temporal(
    q, k, v, out, bias, lam, pairs, heads, tq, tk, d, scale,
    qb, qt, qs, qh, kb, kt, ks, kh, vb, vt, vs, vh, ob, ot, os, oh, bh, bi, bj,
    HAS_BIAS: tl.constexpr, HAS_LAMBDA: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
    E: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pairs, E)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * E + tl.arange(0, E)
    position, head = (e // heads)[:, None, None], (e % heads)[:, None, None]
    here = (e < pairs)[:, None, None]
    i, j, c = tl.arange(0, TQ), tl.arange(0, TK), tl.arange(0, BD)
    rows, cols = i[None, :, None], c[None, None, :]
    inside = here & (rows < tq) & (cols < d)
    query = tl.load(q + row * qb + position * qs + head * qh + rows * qt + cols, mask=inside, other=0.0)
    # keys are read transposed, [E, BD, TK]: the product needs no shuffle
    at = row * kb + position * ks + head * kh + j[None, None, :] * kt + c[None, :, None]
    key = tl.load(k + at, mask=here & (j[None, None, :] < tk) & (c[None, :, None] < d), other=0.0)
    at = row * vb + position * vs + head * vh + j[None, :, None] * vt + cols
    value = tl.load(v + at, mask=here & (j[None, :, None] < tk) & (cols < d), other=0.0)
    if UPCAST:
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    score = tl.dot(query, key, input_precision="ieee" if EXACT else "tf32") * (scale * 1.4426950408889634)
    seen = j[None, None, :] < tk
    if HAS_BIAS:
        at = head * bh + rows * bi + j[None, None, :] * bj
        extra = tl.load(bias + at, mask=here & (rows < tq) & seen, other=0.0)
        score += extra * 1.4426950408889634
    score = tl.where(seen, score, float("-inf"))
    top = tl.max(score, axis=2)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys: exp2(-inf) = 0 throughout
    p = tl.exp2(score - top[:, :, None])
    total = tl.sum(p, axis=2)
    result = tl.dot(p.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
    result = result / tl.where(total == 0.0, 1.0, total)[:, :, None]
    if HAS_LAMBDA:
        weight = tl.load(lam + head, mask=here, other=0.0)
        at = row * vb + position * vs + head * vh + rows * vt + cols
        own = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        result = (1.0 - weight) * result + weight * own
    at = row * ob + position * os + head * oh + rows * ot + cols
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def temporal_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, head_lambda: Tensor | None, scale: float
) -> Tensor:
    """[B, T, S, H, D] in the layout of q; operands in any strides with contiguous channels (others are copied)."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = dense_like(q)
    b, t, s, h, d = q.shape
    if not out.numel():
        return out
    tiles = _tiles(t, k.shape[1], d)
    strides = [*q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *out.stride()[:4]]
    strides += (0, 0, 0) if bias is None else bias.stride()
    with on_device(q.device):
        _temporal[(b * triton.cdiv(s * h, tiles["E"]),)](
            q, k, v, out, q if bias is None else bias, q if head_lambda is None else head_lambda.float(),
            s * h, h, t, k.shape[1], d, scale, *strides,
            HAS_BIAS=bias is not None, HAS_LAMBDA=head_lambda is not None, UPCAST=interpreting(),
            EXACT=q.dtype is torch.float32, **tiles, num_warps=4,
        )  # fmt: skip
    return out


def _tiles(queries: int, keys: int, d: int) -> dict[str, int]:
    """Tile sizes: frames and channels padded to what tensor cores take, pairs so that the tile stays in registers."""
    tq, tk = (max(16, triton.next_power_of_2(n)) for n in (queries, keys))
    bd = max(16, triton.next_power_of_2(d))
    return {"E": max(1, min(8, _TILE // (max(tq, tk) * bd))), "TQ": tq, "TK": tk, "BD": bd}
