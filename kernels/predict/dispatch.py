"""`predict`: one call for kernel and reference, registered so that torch.compile keeps it whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffeff.kernels.predict.reference import reference
from diffeff.kernels.targets import pick, runs_triton

__all__ = ["predict"]

_MAX_TRITON = 6


def predict(snapshots: Sequence[Tensor], weights: Sequence[float], *, kernel: str = "auto") -> Tensor:
    """The weighted sum of snapshots in one pass over each, accumulated in float32.

    `snapshots`: tensors of one shape and dtype; `weights`: as many numbers. Returns their dtype. Forward only.
    Rule of kernel="auto": Triton on CUDA for up to 6 snapshots of one dense layout, the reference elsewhere (and in
    float64). Raises ValueError for no snapshots, or for counts and shapes that differ.
    """
    if not snapshots or len(snapshots) != len(weights):
        raise ValueError(f"predict takes one weight per snapshot, not {len(weights)} for {len(snapshots)}")
    if len({(x.shape, x.dtype) for x in snapshots}) > 1:
        raise ValueError(f"predict takes snapshots of one shape and dtype: {[tuple(x.shape) for x in snapshots]}")
    first = snapshots[0]
    pays = first.is_cuda and runs_triton(first.device) and _fits(snapshots)
    chosen = pick("predict", kernel, first.device, "triton" if pays else "reference")
    if chosen == "sdpa" or (chosen == "triton" and not _fits(snapshots)):
        raise ValueError(
            f"predict kernel {chosen!r} cannot take these {len(snapshots)} snapshots: Triton takes up to {_MAX_TRITON} "
            "of one dense layout, not in float64"
        )
    result: Tensor = _op(list(snapshots), [float(w) for w in weights], chosen == "triton")
    return result


def _fits(snapshots: Sequence[Tensor]) -> bool:
    first = snapshots[0]
    # whoever lies in memory as its own empty copy does is dense: one running offset then reaches all of it
    dense = {x.stride() for x in snapshots} == {torch.empty_like(first, device="meta").stride()}
    return dense and len(snapshots) <= _MAX_TRITON and first.dtype is not torch.float64


@torch.library.custom_op(
    "diffeff::predict", mutates_args=(), schema="(Tensor[] snapshots, float[] weights, bool triton) -> Tensor"
)
def _op(snapshots: Sequence[Tensor], weights: Sequence[float], triton: bool) -> Tensor:
    if triton:
        from diffeff.kernels.predict.triton import predict_triton

        return predict_triton(snapshots, weights)
    return reference(snapshots, weights)


@_op.register_fake
def _(snapshots: Sequence[Tensor], weights: Sequence[float], triton: bool) -> Tensor:
    return torch.empty_like(snapshots[0])
