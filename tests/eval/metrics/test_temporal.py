"""Motion and steadiness on clips whose motion is known to the pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.temporal import (
    flicker,
    flicker_per_frame,
    flow,
    motion_magnitude,
    motion_per_frame,
    warping_error,
)

Clip = NDArray[np.float64]


def texture(size: int, seed: int = 0, blur: float = 2.0) -> Clip:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random((size, size, 3)), (0, 0), blur)
    stretched: Clip = (noise - noise.min()) / (noise.max() - noise.min())
    return stretched


def pan(step: tuple[int, int], size: int = 64, frames: int = 4) -> Clip:
    """A window that moves over a texture by `step` = (x, y) pixels a frame: what it shows moves the other way."""
    world, margin = texture(3 * size), size
    corners = [(margin + t * step[0], margin + t * step[1]) for t in range(frames)]
    return np.stack([world[y : y + size, x : x + size] for x, y in corners])


@pytest.mark.parametrize("step", [(1, 0), (3, 0), (0, -2), (2, 2), (4, -3)])
@pytest.mark.parametrize("size", [48, 64, 96])
def test_motion_of_a_pan_is_its_step(step: tuple[int, int], size: int) -> None:
    length = math.hypot(*step)
    assert motion_magnitude(pan(step, size)) == pytest.approx(length, rel=0.06, abs=0.05)


def test_flow_points_to_where_a_pixel_is_seen_next() -> None:
    grey = [(frame[..., 0] * 255).astype(np.uint8) for frame in pan((3, -1), frames=2)]
    inner = flow(*grey)[16:-16, 16:-16]
    np.testing.assert_allclose(np.median(inner, axis=(0, 1)), (-3, 1), atol=0.05)


def test_a_pan_is_explained_by_its_motion() -> None:
    clip = pan((3, 0))
    changed, unexplained = flicker(clip), warping_error(clip)
    assert changed is not None
    assert unexplained is not None
    assert changed > 0.05
    assert unexplained < 0.1 * changed


def test_flicker_is_not_explained_by_motion() -> None:
    clip = pan((3, 0))
    noisy = (clip + np.random.default_rng(1).normal(0, 0.08, clip.shape)).clip(0, 1)
    steady, boiling = warping_error(clip), warping_error(noisy, reference=clip)
    assert steady is not None
    assert boiling is not None
    # Two independent errors of 0.08 differ by 0.08 * 2 / sqrt(pi) on average; bilinear sampling smooths one of them.
    assert boiling == pytest.approx(0.08 * 2 / math.sqrt(math.pi), rel=0.15)
    assert boiling > 5 * steady


def test_errors_grow_with_noise() -> None:
    clip, rng = pan((2, 1)), np.random.default_rng(2)
    noise = rng.normal(size=clip.shape)
    errors = [warping_error((clip + s * noise).clip(0, 1), clip) for s in (0, 0.02, 0.05, 0.1, 0.2)]
    assert all(e is not None for e in errors)
    assert errors == sorted(errors, key=lambda e: e or 0)


def test_hidden_pixels_do_not_count() -> None:
    """A square that covers new ground each frame: the ground it covers and uncovers is not an error."""
    ground, cover = texture(64, seed=3), texture(20, seed=4)
    clip = np.repeat(ground[None], 4, axis=0)
    for t in range(4):
        clip[t, 22:42, 10 + 5 * t : 30 + 5 * t] = cover
    error, changed = warping_error(clip), flicker(clip)
    assert error is not None
    assert changed is not None
    assert error < 0.35 * changed


def test_a_frozen_clip_is_still() -> None:
    clip = np.repeat(texture(32)[None], 3, axis=0)
    assert flicker(clip) == 0
    assert motion_magnitude(clip) == pytest.approx(0, abs=1e-3)
    assert warping_error(clip) == pytest.approx(0, abs=1e-4)


def test_flicker_known_value_and_bytes() -> None:
    clip = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    clip[1] = 51  # a fifth of white
    np.testing.assert_allclose(flicker_per_frame(clip), (0.2, 0.2))
    assert flicker(clip) == pytest.approx(0.2)


def test_bytes_and_floats_agree() -> None:
    clip = (pan((2, 0)) * 255).round().astype(np.uint8)
    assert motion_magnitude(clip) == motion_magnitude(clip / 255)
    assert warping_error(clip) == pytest.approx(warping_error(clip / 255))


@pytest.mark.parametrize("measure", [flicker, motion_magnitude, warping_error])
def test_a_still_has_no_time_in_it(measure: Callable[[Clip], float | None]) -> None:
    assert measure(np.zeros((1, 16, 16, 3))) is None


def test_each_pair_of_frames_has_its_motion() -> None:
    clip = pan((2, 0))
    assert len(motion_per_frame(clip)) == len(flicker_per_frame(clip)) == len(clip) - 1


def test_tiny_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 12 x 12 pixels, got 8 x 64"):
        motion_magnitude(np.zeros((2, 8, 64, 3)))
    assert motion_magnitude(np.zeros((2, 12, 64, 3))) == pytest.approx(0, abs=1e-3)


def test_a_reference_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="one shape"):
        warping_error(np.zeros((2, 16, 16, 3)), np.zeros((3, 16, 16, 3)))
