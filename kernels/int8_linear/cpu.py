"""int8 matrix products that torch brings along: `torch._int_mm` (CPU and CUDA) and aten's dynamic linear (CPU).

The onednn linear with signed int8 activations is never used: it falls back to a loop a thousand times slower on
common x86 chips. aten's dynamic linear takes unsigned activations.
"""

from __future__ import annotations

import threading
import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.kernels.int8_linear.reference import quantise_rows

__all__ = ["aten_dynamic", "aten_engine", "int_mm", "pack_aten"]

_ENGINES = ("onednn", "x86", "fbgemm")
_engine_lock = threading.Lock()


# --- torch._int_mm --------------------------------------------------------------------------------------------------
def int_mm(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] with one dynamic scale per token; see `reference`. CUDA pads shapes its kernel does not take."""
    qx, sx = quantise_rows(x)
    product = _product_cuda(qx, qweight) if x.is_cuda else torch._int_mm(qx, qweight.t())
    y = product.float().mul_(sx).mul_(scale)
    return (y if bias is None else y.add_(bias.float())).to(x.dtype)


def _product_cuda(qx: Tensor, qweight: Tensor) -> Tensor:
    """cuBLASLt's int8 product wants more than 16 rows, and K and N in multiples of 8: zeros fill up the rest."""
    (m, k), n = qx.shape, len(qweight)
    rows, inner, outer = max(0, 32 - m) if m <= 16 else 0, -k % 8, -n % 8
    if rows or inner:
        qx = F.pad(qx, (0, inner, 0, rows))
    if inner or outer:
        qweight = F.pad(qweight, (0, inner, 0, outer))
    return torch._int_mm(qx, qweight.t())[:m, :n]


# --- aten quantized::linear_dynamic ---------------------------------------------------------------------------------
def aten_engine() -> str | None:
    """The quantised engine to use on this machine, onednn first; None where torch was built without one."""
    available = torch.backends.quantized.supported_engines
    return next((engine for engine in _ENGINES if engine in available), None)


def pack_aten(qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """The weight in the layout of aten's engine: one more copy, of the size of `qweight`."""
    engine = aten_engine()
    if engine is None:
        raise RuntimeError("int8_linear kernel 'aten_dynamic': this build of torch has no quantised engine")
    zero = torch.zeros(len(scale), dtype=torch.int64)
    with _engine_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch deprecates its quantised dtypes; the op has no other input
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            weight = torch._make_per_channel_quantized_tensor(qweight.contiguous(), scale.double(), zero, 0)
            return torch.ops.quantized.linear_prepack(weight, None if bias is None else bias.float())
        finally:
            torch.backends.quantized.engine = before


def aten_dynamic(x: Tensor, packed: Any) -> Tensor:
    """y [M, N] with one dynamic scale per call: faster than `int_mm` on some CPUs, and less accurate.

    One outlier token coarsens the scale of all. Error of one layer on Gaussian data: about 1.3 % relative, 2.2 % where
    the chip needs 7-bit activations.
    """
    y: Tensor = torch.ops.quantized.linear_dynamic(x.float().contiguous(), packed, _saturates())
    return y.to(x.dtype)


@cache
def _saturates() -> bool:
    """Whether 8-bit activations overflow the 16-bit sums of this chip (x86 before VNNI): then 7 bits must do. Tried,
    not looked up: the largest products that occur are multiplied and compared."""
    k = 256
    weight, x = torch.full((8, k), 127, dtype=torch.int8), torch.ones(4, k)
    x[0, 0] = 0.0
    y = torch.ops.quantized.linear_dynamic(x, pack_aten(weight, torch.full((8,), 1 / 127)), False)
    return bool((y[1] - k).abs().max() > 0.01 * k)
