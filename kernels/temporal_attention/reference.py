"""What `temporal_attention` means, in plain torch: the specification, the fallback, and the oracle of the kernel.

Per batch row, position and head, over the frames of that position:

    a = softmax(scale * q k^T + bias);   o = (1 - lambda_h) a v + lambda_h v

All tensors lie as the feature map does, [batch, frames, positions, heads, head_dim]: no frame axis is moved, so no
copy is made on the way in or out. A frame whose row of scores is -inf throughout gets a = 0.

Source of the epilogue: SoftPAG (arXiv 2506.10978), (1 - lambda) a + lambda I on chosen heads, without the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffeff.kernels.targets import dense_like

__all__ = ["frame_bias", "reference"]

_SLICE_BYTES = 1 << 25
"""Positions are taken so many at a time that their scores in float32 fit into this (32 MiB)."""


def frame_bias(heads: int, queries: int, keys: int, bias: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """float32 [heads, queries, keys] (expanded, not copied) of an additive bias and multiplicative frame weights.

    `weights` are factors of exp(score): 2 counts a frame twice, 0 hides it. Both broadcast against the result.
    """
    if bias is None and weights is None:
        return None
    total = None if bias is None else bias.float()
    if weights is not None:
        total = weights.float().log() if total is None else total + weights.float().log()
    return None if total is None else total.expand(heads, queries, keys)


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, head_lambda: Tensor | None, scale: float) -> Tensor:
    """[B, T, S, H, D] in dtype and layout of q, sums in at least float32; see `temporal_attention`."""
    out = dense_like(q)
    b, t, s, h, _ = q.shape
    step = max(1, _SLICE_BYTES // max(1, 4 * b * h * t * k.shape[1]))
    for start in range(0, s, step):
        part = slice(start, start + step)
        out[:, :, part] = _positions(q[:, :, part], k[:, :, part], v[:, :, part], bias, head_lambda, scale)
    return out


def _positions(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, head_lambda: Tensor | None, scale: float
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bishd,bjshd->bshij", q.to(wide), k.to(wide)) * scale
    if bias is not None:
        scores += bias.to(wide)
    probabilities = torch.softmax(scores, -1)
    probabilities = probabilities.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    out = torch.einsum("bshij,bjshd->bishd", probabilities, v.to(wide))
    return out if head_lambda is None else torch.lerp(out, v.to(wide), head_lambda.to(wide)[:, None])
