"""`group_norm_two_pass`: one call for kernel and reference, registered so that torch.compile keeps it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from diffeff.kernels.group_norm.reference import reference
from diffeff.kernels.targets import pick, runs_triton

__all__ = ["group_norm_two_pass"]


def group_norm_two_pass(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    frames: int = 1,
    kernel: str = "auto",
) -> Tensor:
    """Group norm, with SiLU in the same pass and over several frames together, without reordering the map.

    `x`: [rows, channels, ...], channels first or last in memory; `weight`, `bias`: [channels]. With `frames` > 1 each
    group is taken over that many consecutive rows, as video UNets do over [batch * frames, channels, height, width]:
    the permuted copy that torch's group norm needs there is not made. Returns the shape and layout of `x`. Statistics
    in float32, without cancellation. Forward only.

    Rule of kernel="auto": Triton on CUDA, the reference elsewhere. Raises ValueError for shapes that do not fit.
    """
    if x.ndim < 2 or x.shape[1] % groups or x.shape[0] % frames:
        raise ValueError(f"group norm of {tuple(x.shape)} in {groups} groups of channels over {frames} frames")
    pays = x.is_cuda and runs_triton(x.device) and x.dtype is not torch.float64
    chosen = pick("group_norm_two_pass", kernel, x.device, "triton" if pays else "reference")
    if chosen == "sdpa":
        raise ValueError("group_norm_two_pass has no kernel 'sdpa'; known: auto, triton, reference")
    result: Tensor = _op(x, groups, weight, bias, eps, silu, frames, chosen == "triton")
    return result


@torch.library.custom_op(
    "diffeff::group_norm_two_pass",
    mutates_args=(),
    schema="(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, int frames, bool triton) "
    "-> Tensor",
)
def _op(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    frames: int,
    triton: bool,
) -> Tensor:
    if triton:
        from diffeff.kernels.group_norm.triton import group_norm_triton

        return group_norm_triton(x, groups, weight, bias, eps, silu, frames)
    out = reference(x, groups, weight, bias, eps, silu, frames)
    return torch.empty_like(x).copy_(out) if out.stride() != torch.empty_like(x, device="meta").stride() else out


@_op.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)
