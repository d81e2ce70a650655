"""How far a result is from the plain one at the same seed: pixels of a clip, or the latents before decoding.

A clip is `[F, H, W, 3]`, floating point in [0, 1] or uint8 (divided by 255). Nothing is clipped and nothing is
hidden: a pixel that is not a number makes the figure not a number. All sums are in float64, one frame at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError

__all__ = [
    "check_clip",
    "latent_cosine",
    "latent_relative_l2",
    "mae",
    "mae_per_frame",
    "max_abs",
    "psnr",
    "psnr_per_frame",
    "ssim",
    "ssim_per_frame",
    "unit_pixels",
]

Pixels = NDArray[Any]
Floats = NDArray[np.float64]

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def unit_pixels(pixels: Pixels) -> Floats:
    """Pixels as float64 with white at 1: uint8 is divided by 255, floating point is taken as it is.

    Raises ConfigError for any other kind of number: its white is not known.
    """
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, dtype=np.float64) / 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ConfigError(f"pixels are {pixels.dtype}: give uint8, or floating point in [0, 1]")
    return np.asarray(pixels, dtype=np.float64)


def check_clip(clip: Pixels, what: str = "clip") -> None:
    """Raise ConfigError unless this is `[F, H, W, 3]` with at least one pixel."""
    if clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise ConfigError(f"the {what} has shape {clip.shape}: it must be [frames, height, width, 3], none of them 0")


def psnr(reference: Pixels, other: Pixels, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; inf when identical.

    This is the ratio of the mean error, not the mean of the frames' ratios, so one identical frame does not make it
    infinite. Raises ConfigError for arrays of different shapes: another size has no pixel-wise fidelity.
    """
    return float(_decibels(_each(reference, other, "psnr", _squared).mean(), peak))


def psnr_per_frame(reference: Pixels, other: Pixels, peak: float = 1.0) -> Floats:
    """PSNR of every frame in dB, [F]; inf where a frame is identical. Raises ConfigError as `psnr`."""
    _check_clips(reference, other, "psnr")
    return _decibels(_each(reference, other, "psnr", _squared), peak)


def mae(reference: Pixels, other: Pixels) -> float:
    """Mean absolute difference over all pixels, as a share of white; 0 when identical. Raises as `psnr`."""
    return float(_each(reference, other, "mae", _absolute).mean())


def mae_per_frame(reference: Pixels, other: Pixels) -> Floats:
    """Mean absolute difference of every frame, [F]. Raises ConfigError as `psnr`."""
    _check_clips(reference, other, "mae")
    return _each(reference, other, "mae", _absolute)


def max_abs(reference: Pixels, other: Pixels) -> float:
    """Largest difference of any pixel; 0 only when bit-identical. Raises ConfigError for other shapes."""
    return float(_each(reference, other, "max_abs", lambda x, y: np.abs(x - y).max()).max())


def ssim(reference: Pixels, other: Pixels) -> float:
    """Structural similarity of two clips, the mean over frames; 1 when identical. See `ssim_per_frame`."""
    return float(np.mean(ssim_per_frame(reference, other)))


def ssim_per_frame(reference: Pixels, other: Pixels) -> Floats:
    """Structural similarity of every frame, [F], in [-1, 1].

    As published: an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, the mean over
    the pixels whose window lies inside the frame, and over the three colours. scikit-image gives the same number with
    `gaussian_weights=True, use_sample_covariance=False`. Raises ConfigError for other shapes and for frames smaller
    than the window. Source: Wang, Bovik, Sheikh, Simoncelli 2004, equation 13.
    """
    _check_clips(reference, other, "ssim")
    height, width = other.shape[1:3]
    if min(height, width) < _WINDOW:
        raise ConfigError(f"ssim needs frames of at least {_WINDOW} x {_WINDOW} pixels, got {height} x {width}")
    return _each(reference, other, "ssim", _ssim_frame)


def latent_cosine(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Cosine of two latents as one long vector each, in [-1, 1]; any shape. Not a number if either is all zero.

    Raises ConfigError for arrays of different shapes.
    """
    a, b = _latents(reference, other, "latent_cosine")
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / length, -1, 1)) if length > 0 else float("nan")


def latent_relative_l2(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Length of the difference of two latents over the length of the reference; 0 when identical, any shape.

    Infinite for a reference of zeros that is not met. Raises ConfigError for arrays of different shapes.
    """
    a, b = _latents(reference, other, "latent_l2")
    error, length = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
    if error == 0:
        return 0.0
    return error / length if length > 0 else float("inf")


def _same_shape(a: NDArray[Any], b: NDArray[Any], metric: str) -> None:
    if a.shape != b.shape:
        raise ConfigError(f"{metric} needs arrays of one shape, got {a.shape} and {b.shape}")


def _check_clips(reference: Pixels, other: Pixels, metric: str) -> None:
    _same_shape(reference, other, metric)
    check_clip(reference, "reference")


def _each(reference: Pixels, other: Pixels, metric: str, measure: Callable[[Floats, Floats], Any]) -> Floats:
    """The measure of each frame (of each part along the first axis): only one is in float64 at a time."""
    _same_shape(reference, other, metric)
    if reference.size == 0:
        raise ConfigError(f"{metric} needs pixels, got arrays of shape {reference.shape}")
    pairs = zip(np.atleast_1d(reference), np.atleast_1d(other), strict=True)
    return np.array([measure(unit_pixels(np.asarray(a)), unit_pixels(np.asarray(b))) for a, b in pairs], np.float64)


def _squared(x: Floats, y: Floats) -> Any:
    return ((x - y) ** 2).mean()


def _absolute(x: Floats, y: Floats) -> Any:
    return np.abs(x - y).mean()


def _latents(reference: NDArray[Any], other: NDArray[Any], metric: str) -> tuple[Floats, Floats]:
    _same_shape(reference, other, metric)
    return np.asarray(reference, dtype=np.float64).ravel(), np.asarray(other, dtype=np.float64).ravel()


def _decibels(error: NDArray[Any] | np.floating[Any], peak: float) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(peak**2 / np.asarray(error, dtype=np.float64)))


def _ssim_frame(x: Floats, y: Floats) -> float:
    c1, c2 = _K1**2, _K2**2  # times the peak squared, which is 1
    mu_x, mu_y = _blur(x), _blur(y)
    xx, yy, xy = _blur(x * x) - mu_x * mu_x, _blur(y * y) - mu_y * mu_y, _blur(x * y) - mu_x * mu_y
    top = (2 * mu_x * mu_y + c1) * (2 * xy + c2)
    similarity = top / ((mu_x**2 + mu_y**2 + c1) * (xx + yy + c2))
    edge = _WINDOW // 2
    return float(similarity[edge:-edge, edge:-edge].mean())


def _blur(frame: Floats) -> Floats:
    import cv2

    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    return np.asarray(cv2.sepFilter2D(frame, cv2.CV_64F, weights, weights, borderType=cv2.BORDER_REFLECT), np.float64)
