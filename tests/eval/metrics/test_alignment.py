"""CLIP score and consistency against cosines by hand and against torchmetrics' formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.alignment import clip_score, clip_temporal_consistency


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_scores_of_images_are_scaled_cosines() -> None:
    images, texts = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    by_hand = [100 * max(cosine(i, t), 0) for i, t in zip(images.astype(float), texts.astype(float), strict=True)]
    np.testing.assert_allclose(clip_score(images, texts), by_hand, rtol=1e-10)
    np.testing.assert_allclose(clip_score(7 * images, texts / 3, scale=2.5), np.array(by_hand) / 40, rtol=1e-6)


def test_known_angles() -> None:
    images = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 4.0]])
    texts = np.tile([1.0, 0.0], (4, 1))
    np.testing.assert_allclose(clip_score(images, texts), [100, 0, 0, 60], atol=1e-12)


def test_the_score_of_a_clip_is_the_mean_of_its_frames() -> None:
    clips = np.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 4.0]]])
    assert clip_score(clips, np.array([[2.0, 0.0]])) == pytest.approx([(100 + 0 + 0 + 60) / 4])


def test_consistency_known_values() -> None:
    assert clip_temporal_consistency(np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 5.0]])) == pytest.approx((0.6 + 0.8) / 2)
    assert clip_temporal_consistency(np.ones((4, 3))) == pytest.approx(1)
    assert clip_temporal_consistency(np.ones((1, 3))) is None


def test_consistency_falls_as_frames_drift_apart() -> None:
    rng = np.random.default_rng(0)
    still, drift = rng.normal(size=64), rng.normal(size=(9, 64))
    values = [clip_temporal_consistency(still + s * drift) for s in (0, 0.1, 0.3, 1, 3)]
    assert values == sorted(values, key=lambda v: -(v or 0))


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 3)), "one prompt for each item"),
        (np.ones((2, 3)), np.ones((2, 4)), "both from one model"),
        (np.ones(3), np.ones((1, 3)), "embeddings must be"),
        (np.ones((2, 0, 3)), np.ones((2, 3)), "embeddings must be"),
        (np.ones((2, 3)), np.eye(2, 3) * [[1], [0]], "text 1: its embedding is all zeros"),
        (np.zeros((2, 3)), np.ones((2, 3)), "image 0: its embedding is all zeros"),
    ],
)
def test_bad_embeddings(images: NDArray[Any], texts: NDArray[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clip_score(images, texts)


def test_bad_frames() -> None:
    with pytest.raises(ConfigError, match=r"\[frames, dimensions\]"):
        clip_temporal_consistency(np.ones(3))
    with pytest.raises(ConfigError, match="image 1"):
        clip_temporal_consistency(np.array([[1.0, 0.0], [0.0, 0.0]]))
