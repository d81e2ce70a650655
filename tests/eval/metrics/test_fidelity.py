"""Fidelity figures: known values, scikit-image's, identity, refusal of what has no pixel-wise fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from skimage import metrics as skimage

from diffeff.errors import ConfigError
from diffeff.eval.metrics import fidelity
from diffeff.eval.metrics.fidelity import (
    latent_cosine,
    latent_relative_l2,
    mae,
    mae_per_frame,
    max_abs,
    psnr,
    psnr_per_frame,
    ssim,
    ssim_per_frame,
)

PAIRED: list[Callable[..., Any]] = [psnr, mae, max_abs, ssim, psnr_per_frame, mae_per_frame, ssim_per_frame]


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 1, 3 * 24 * 17 * 3).reshape(3, 24, 17, 3)
    return smooth, (smooth + rng.normal(0, 0.1, smooth.shape)).clip(0, 1)


def test_identical_arrays() -> None:
    frames = np.random.default_rng(0).random((3, 12, 12, 3), dtype=np.float32)
    assert math.isinf(psnr(frames, frames.copy()))
    assert np.isinf(psnr_per_frame(frames, frames)).all()
    assert max_abs(frames, frames.copy()) == mae(frames, frames) == latent_relative_l2(frames, frames) == 0
    assert ssim(frames, frames) == pytest.approx(1, abs=1e-12)
    assert latent_cosine(frames, frames) == pytest.approx(1, abs=1e-12)


def test_a_constant_error_of_a_tenth_is_twenty_decibels() -> None:
    frames = np.zeros((2, 4, 4, 3), dtype=np.float32)
    assert psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-5)
    assert max_abs(frames, frames + 0.1) == pytest.approx(0.1)
    assert mae(frames, frames + 0.1) == pytest.approx(0.1)


def test_psnr_is_scikit_images(clips: tuple[np.ndarray, np.ndarray]) -> None:
    plain, noisy = clips
    assert psnr(plain, noisy) == pytest.approx(skimage.peak_signal_noise_ratio(plain, noisy, data_range=1), rel=1e-12)
    frames = [skimage.peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(plain, noisy, strict=True)]
    np.testing.assert_allclose(psnr_per_frame(plain, noisy), frames, rtol=1e-12)


def test_ssim_is_scikit_images(clips: tuple[np.ndarray, np.ndarray]) -> None:
    plain, noisy = clips
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    frames = [skimage.structural_similarity(a, b, channel_axis=2, **options) for a, b in zip(plain, noisy, strict=True)]
    np.testing.assert_allclose(ssim_per_frame(plain, noisy), frames, rtol=1e-10)
    assert ssim(plain, noisy) == pytest.approx(np.mean(frames), rel=1e-10)
    assert 0 < ssim(plain, noisy) < 0.9


def test_ssim_of_opposites_is_negative() -> None:
    board = np.indices((32, 32)).sum(axis=0)[None, :, :, None] % 2 * np.ones(3)
    assert ssim(board, 1 - board) < -0.9


def test_the_smallest_frame_ssim_takes_has_one_window() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 11, 11, 3)), rng.random((1, 11, 11, 3))
    assert -1 <= ssim(a, b) <= 1
    with pytest.raises(ConfigError, match="at least 11 x 11 pixels, got 10 x 11"):
        ssim(a[:, :10], b[:, :10])


@pytest.mark.parametrize("measure", PAIRED)
def test_bytes_are_a_share_of_white(measure: Callable[..., Any]) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 256, (2, 2, 12, 13, 3), dtype=np.uint8)
    np.testing.assert_allclose(measure(a, b), measure(a / 255, b / 255), rtol=1e-12)


def test_per_frame_figures_are_those_of_each_frame_alone(clips: tuple[np.ndarray, np.ndarray]) -> None:
    plain, noisy = clips
    for name in ("psnr", "ssim", "mae"):
        whole, alone = getattr(fidelity, f"{name}_per_frame"), getattr(fidelity, name)
        figures = [alone(plain[t : t + 1], noisy[t : t + 1]) for t in range(len(plain))]
        np.testing.assert_allclose(whole(plain, noisy), figures, rtol=1e-12)


def test_one_identical_frame_does_not_make_a_clip_identical(clips: tuple[np.ndarray, np.ndarray]) -> None:
    plain, noisy = clips
    half = noisy.copy()
    half[0] = plain[0]
    assert math.isinf(psnr_per_frame(plain, half)[0])
    assert psnr(plain, half) > psnr(plain, noisy)
    assert math.isfinite(psnr(plain, half))


def test_not_a_number_is_not_hidden() -> None:
    frames = np.zeros((1, 12, 12, 3), dtype=np.float32)
    broken = frames.copy()
    broken[0, 6, 6, 0] = np.nan
    assert math.isnan(psnr(frames, broken))
    assert math.isnan(mae(frames, broken))
    assert math.isnan(max_abs(frames, broken))
    assert math.isnan(ssim(frames, broken))


@pytest.mark.parametrize("measure", [*PAIRED, latent_cosine, latent_relative_l2])
def test_other_shapes_are_refused(measure: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        measure(np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 2, 3)))


def test_any_shape_has_pixels_but_none_is_refused() -> None:
    assert mae(np.array(0.5), np.array(0.25)) == 0.25
    assert max_abs(np.zeros(4), np.array([0, 0.5, 0, -0.75])) == 0.75
    with pytest.raises(ConfigError, match="needs pixels"):
        psnr(np.zeros((0, 2)), np.zeros((0, 2)))


def test_pixels_of_unknown_white_are_refused() -> None:
    whole = np.zeros((1, 2, 2, 3), dtype=np.int64)
    with pytest.raises(ConfigError, match="pixels are int64: give uint8"):
        psnr(whole, whole)


@pytest.mark.parametrize("shape", [(2, 2, 3), (0, 2, 2, 3), (1, 2, 2, 4)])
def test_what_is_not_a_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must be \[frames, height, width, 3\]"):
        mae_per_frame(np.zeros(shape), np.zeros(shape))


def test_latents_known_values() -> None:
    x, y = np.array([[3.0, 0.0]], dtype=np.float32), np.array([[3.0, 4.0]], dtype=np.float32)
    assert latent_cosine(x, y) == pytest.approx(0.6)
    assert latent_relative_l2(x, y) == pytest.approx(4 / 3)
    assert latent_cosine(x, -x) == -1


def test_latents_of_zeros() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert math.isnan(latent_cosine(zero, one))
    assert math.isinf(latent_relative_l2(zero, one))
    assert latent_relative_l2(zero, zero) == 0
