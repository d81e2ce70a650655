"""`int8_attention_qk`: one call for kernel and reference, registered so that torch.compile keeps it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from diffeff.kernels.int8_attention.reference import reference
from diffeff.kernels.targets import pick, runs_triton

__all__ = ["int8_attention_qk"]


def int8_attention_qk(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, smooth: bool = True, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention whose scores come from int8 products: at most 1.33 times the speed of half precision, at a small loss.

    `q`: [B, H, N, D]; `k`, `v`: [B, H, M, D] in any strides, M >= 1, no mask. `smooth` takes the mean of the keys out
    first, which costs a pass and much reduces the loss where channels carry offsets. Returns the output [B, H, N, D]
    and the float32 logsumexp [B, H, N]. On the CPU the reference emulates the loss; it saves no time. Forward only.

    Rule of kernel="auto": Triton on CUDA, the reference elsewhere. Raises ValueError for shapes that do not fit.
    """
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3]):
        raise ValueError(
            f"int8_attention_qk takes [batch, heads, tokens, head_dim], not {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if q.shape[3] != k.shape[3] or not k.shape[2]:
        raise ValueError(f"int8_attention_qk needs keys as wide as queries, at least one: {tuple(k.shape)}")
    pays = q.is_cuda and runs_triton(q.device)
    chosen = pick("int8_attention_qk", kernel, q.device, "triton" if pays else "reference")
    if chosen == "sdpa":
        raise ValueError("int8_attention_qk has no kernel 'sdpa'; known: auto, triton, reference")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    result: tuple[Tensor, Tensor] = _op(q, k, v, factor, smooth, chosen == "triton")
    return result


@torch.library.custom_op(
    "diffeff::int8_attention_qk",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, bool smooth, bool triton) -> (Tensor, Tensor)",
)
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool, triton: bool) -> tuple[Tensor, Tensor]:
    if triton:
        from diffeff.kernels.int8_attention.triton import int8_attention_triton

        return int8_attention_triton(q, k, v, scale, smooth)
    return reference(q, k, v, scale, smooth)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool, triton: bool) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    out = torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
    return out, torch.empty(b, h, n, dtype=torch.float32, device=q.device)
