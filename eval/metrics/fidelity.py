"""How far a result is from the plain one at the same seed, on arrays of pixels in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["max_abs", "psnr"]


def psnr(reference: NDArray[Any], other: NDArray[Any], peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; inf when identical.

    Raises ValueError for arrays of different shapes: a result of another size has no pixel-wise fidelity.
    """
    if reference.shape != other.shape:
        raise ValueError(f"psnr needs arrays of one shape, got {reference.shape} and {other.shape}")
    error = float(np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def max_abs(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest difference of any pixel; 0 only when bit-identical. Raises ValueError for other shapes."""
    if reference.shape != other.shape:
        raise ValueError(f"max_abs needs arrays of one shape, got {reference.shape} and {other.shape}")
    return float(np.max(np.abs(reference.astype(np.float64) - other.astype(np.float64)), initial=0.0))
