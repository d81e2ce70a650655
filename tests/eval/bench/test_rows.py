"""Pictures of clips inside rows: small, and as good as that allows."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffeff.eval.bench.rows import strip


def decoded(text: str) -> NDArray[np.uint8]:
    data = base64.b64decode(text)
    assert len(data) <= 24_000
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_strip_that_fits_is_lossless() -> None:
    clip = np.full((9, 32, 32, 3), 20, np.uint8)
    for number, frame in enumerate(clip):
        frame[10:20, number : number + 10] = (230, 60, 50)
    assert np.array_equal(decoded(strip(clip)), np.concatenate(list(clip), axis=1))


def test_a_smooth_clip_keeps_its_frames_at_a_lower_quality() -> None:
    y, x = np.mgrid[0:96, 0:96]
    noise = np.random.default_rng(0).normal(0, 3, (9, 96, 96, 3))
    clip = (noise + (60 + x + y)[None, ..., None]).clip(0, 255).astype(np.uint8)
    found = decoded(strip(clip))
    assert found.shape == (96, 9 * 96, 3)
    assert np.abs(found.astype(int) - np.concatenate(list(clip), axis=1)).mean() < 4


@pytest.mark.parametrize("shape", [(9, 64, 64, 3), (49, 240, 416, 3), (1, 512, 512, 3)])
def test_whatever_the_clip_the_strip_is_small(shape: tuple[int, ...]) -> None:
    clip = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    height, width, _ = decoded(strip(clip)).shape
    assert height <= 96
    assert width >= height
