"""What `int8_attention_qk` means, in plain torch: the specification, the fallback, and the oracle of the kernel.

    K' = K - mean of K over tokens;   qi = round(Q / sq),  ki = round(K' / sk)     in blocks of tokens
    S = (qi ki^T) sq sk scale;        O = softmax(S) V,    V and the softmax in float

The mean of K adds the same number to every score of a query, so that softmax does not see it go; what it leaves is
small where channels carry an offset, as they do in trained models. The lse gets the number back.

Source: SageAttention (arXiv 2410.02367), blocks of 128 queries and 64 keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KEY_BLOCK", "QUERY_BLOCK", "quantise_blocks", "reference", "smooth_keys"]

QUERY_BLOCK, KEY_BLOCK = 128, 64
_LEVELS = 127
_TINY = 1e-30
_SLICE = 1024
"""Queries whose scores exist at a time."""


def smooth_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, N, D] without their mean over tokens, and that mean [B, H, 1, D], both float32."""
    mean = k.float().mean(2, keepdim=True)
    return k.float() - mean, mean


def quantise_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int8 [B, H, N, D] and float32 scales [B, H, blocks], one symmetric scale per `block` tokens."""
    n = x.shape[2]
    blocks = -(-n // block)
    padded = F.pad(x.float(), (0, 0, 0, blocks * block - n)).unflatten(2, (blocks, block))
    scale = padded.abs().amax((-1, -2)).clamp_min(_TINY) / _LEVELS
    q = (padded / scale[..., None, None]).round().to(torch.int8)
    return q.flatten(2, 3)[:, :, :n].contiguous(), scale


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] (memory laid out [B, N, H, D]) and float32 lse [B, H, N] from the same int8 operands."""
    keys, mean = smooth_keys(k) if smooth else (k.float(), None)
    (qi, sq), (ki, sk) = quantise_blocks(q, QUERY_BLOCK), quantise_blocks(keys, KEY_BLOCK)
    queries = qi.float() * _per_token(sq, QUERY_BLOCK, q.shape[2])
    keys = ki.float() * _per_token(sk, KEY_BLOCK, k.shape[2])
    b, h, n, _ = q.shape
    out = torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h, n, device=q.device)
    for start in range(0, n, _SLICE):
        part = slice(start, start + _SLICE)
        scores = queries[:, :, part] @ keys.transpose(-1, -2) * scale
        lse[:, :, part] = scores.logsumexp(-1)
        out[:, :, part] = (scores - lse[:, :, part, None]).exp() @ v.float()
    return out, lse if mean is None else lse + mean_term(q, mean, scale)


def mean_term(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """What smoothing took from every score of a query: scale * q . mean, float32 [B, H, N]."""
    return (q.float() @ mean.transpose(-1, -2))[..., 0] * scale


def _per_token(scale: Tensor, block: int, tokens: int) -> Tensor:
    return scale.repeat_interleave(block, 2)[:, :, :tokens, None]
