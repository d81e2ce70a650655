"""`temporal_attention`: one call for kernel and reference, registered so that torch.compile keeps it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from diffeff.kernels.targets import dense_like, pick, runs_triton
from diffeff.kernels.temporal_attention.reference import frame_bias, reference

__all__ = ["MAX_FRAMES", "temporal_attention"]

MAX_FRAMES = 32
"""The longest sequence the kernel holds in registers; longer ones belong to `sliced_attention`."""


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    head_lambda: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention over frames, read and written where the feature map lies: no permute copies on either side.

    `q`: [B, T, S, H, D] (batch, frames, positions, heads, channels of a head) in any strides, `k`, `v`:
    [B, T', S, H, D]; T, T' <= 32. `bias` (added to the scores) and `weights` (factors of the probabilities before they
    are normalised; 0 hides a frame) broadcast to [H, T, T']. `head_lambda`: [H] in 0..1, how far each head's output is
    moved to its own value (SoftPAG; 1 is perturbed-attention guidance); it needs T == T'. `scale` defaults to D**-0.5.
    Returns [B, T, S, H, D], dense, with its dimensions in memory in the order
    of q's. A frame that sees nothing gets zeros. Forward only.

    Rule of kernel="auto": Triton on CUDA, the reference elsewhere. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, head_lambda)
    chosen = pick("temporal_attention", kernel, q.device, "triton" if _pays(q) else "reference")
    if chosen == "sdpa":
        raise ValueError("temporal_attention has no kernel 'sdpa'; known: auto, triton, reference")
    b = frame_bias(q.shape[3], q.shape[1], k.shape[1], bias, weights)
    result: Tensor = _op(q, k, v, b, head_lambda, q.shape[-1] ** -0.5 if scale is None else scale, chosen == "triton")
    return result


def _pays(q: Tensor) -> bool:
    return q.is_cuda and runs_triton(q.device) and q.dtype is not torch.float64


def _check(q: Tensor, k: Tensor, v: Tensor, head_lambda: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    same = q.ndim == k.ndim == 5 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not same:
        raise ValueError(f"temporal_attention takes [batch, frames, positions, heads, head_dim], not {shapes}")
    if max(q.shape[1], k.shape[1]) > MAX_FRAMES:
        raise ValueError(f"temporal_attention takes at most {MAX_FRAMES} frames: {shapes}. Use sliced_attention.")
    if head_lambda is not None and (q.shape[1] != k.shape[1] or head_lambda.shape != q.shape[3:4]):
        raise ValueError(f"head_lambda {tuple(head_lambda.shape)} needs one value per head and q, k of equal frames")


@torch.library.custom_op(
    "diffeff::temporal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? head_lambda, float scale, bool triton) -> Tensor",
)
def _op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, head_lambda: Tensor | None, scale: float, triton: bool
) -> Tensor:
    if triton:
        from diffeff.kernels.temporal_attention.triton import temporal_attention_triton

        return temporal_attention_triton(q, k, v, bias, head_lambda, scale)
    return reference(q, k, v, bias, head_lambda, scale)


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, head_lambda: Tensor | None, scale: float, triton: bool
) -> Tensor:
    return dense_like(q)
