"""What `int8_linear` means, in plain torch: the specification, and the oracle of every other kernel.

    qx = round(x / sx),  sx = max|x| / 127 over each row (token);   qw, sw likewise over each output channel
    y  = (qx @ qw^T) * sx * sw + b        with the product of integers exact

Symmetric quantisation with 255 levels, rounding half to even. Error of one layer on Gaussian data: about
`max|x| / (127 * sqrt(12) * std)` relative, once for the activations and once for the weights, 0.7 to 1.2 % together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dequantise", "quantise_rows", "reference", "weight_only"]

LEVELS = 127
_TINY = 1e-30
"""Lower bound of max|x|: a row of zeros gets a finite scale. Far below any half-precision number but zero."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 scales [M, 1] of a float tensor [M, K], one symmetric scale per row.

    For activations a row is a token; for a weight [N, K] it is an output channel. A row with a NaN or an infinity gets
    a scale that is one too, so that it cannot pass unnoticed.
    """
    x = x.float()  # one dtype throughout: mixed-dtype arithmetic costs ten times as much on CPUs
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY).div_(LEVELS) if x.shape[1] else x.new_ones(len(x), 1)
    return (x / scale).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def dequantise(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that `qweight` int8 [N, K] and `scale` float32 [N] stand for."""
    return (qweight.float() * scale[:, None]).to(dtype)


def weight_only(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [M, K] times the dequantised weight: int8 storage, exact activations, float arithmetic, a gradient in x."""
    return F.linear(x, dequantise(qweight, scale, x.dtype), None if bias is None else bias.to(x.dtype))


def reference(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in the dtype of `x` [M, K]; the integer product in float64, where it is exact up to K = 2**38."""
    qx, sx = quantise_rows(x)
    y = (qx.double() @ qweight.double().T) * sx.double() * scale.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)
