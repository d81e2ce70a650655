"""What the cases of kernels share: the device, seeded tensors, the relative error, and bounds by dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BOUND", "DEVICE", "DTYPES", "error", "noise"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative error of a right kernel stays at half of these or less: it rounds operands and result once."""


def error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact|| in float64; infinite where out is not finite."""
    out, exact = out.double().cpu(), exact.double().cpu()
    if out.shape != exact.shape or not torch.isfinite(out).all():
        return float("inf")
    return float((out - exact).norm() / exact.norm().clamp_min(1e-300))


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)
