"""The LPIPS-style distance: known angles between feature maps, a torch oracle, a small convolutional backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffeff.errors import ConfigError
from diffeff.eval.metrics.perceptual import MapSource, perceptual, perceptual_per_frame, unweighted


class Backbone:
    """Two convolutions with random weights, both layers shown."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(8, 3, 3, 3, generator=generator)
        self.second = torch.randn(5, 8, 3, 3, generator=generator)
        self.batches: list[int] = []

    def maps(self, frames: Tensor) -> Sequence[Tensor]:
        assert frames.dtype == torch.uint8
        self.batches.append(len(frames))
        one = torch.relu(torch.nn.functional.conv2d(frames.float() / 255 - 0.5, self.first))
        return one, torch.nn.functional.conv2d(one, self.second, stride=2)


def clip(seed: int, frames: int = 5) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (frames, 12, 14, 3), dtype=np.uint8)


def oracle(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    units = [[torch.nn.functional.normalize(layer.double(), dim=1) for layer in maps] for maps in (a, b)]
    return sum((x - y).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(*units, strict=True))  # type: ignore[return-value]


def test_known_angles() -> None:
    right, up, left = (np.array(v, dtype=float).reshape(1, 2, 1, 1) for v in ([2, 0], [0, 5], [-1, 0]))
    assert unweighted([right], [right]) == pytest.approx([0])
    assert unweighted([right], [up]) == pytest.approx([2])
    assert unweighted([right, right], [left, up]) == pytest.approx([4 + 2])


def test_positions_are_averaged() -> None:
    a = np.zeros((1, 2, 2, 2))
    a[:, 0] = 1
    b = a.copy()
    b[0, :, 0, 0] = (0, 3)  # one position of four at a right angle
    assert unweighted([a], [b]) == pytest.approx([0.5])


def test_a_dead_position_is_no_error() -> None:
    assert unweighted([np.zeros((1, 3, 2, 2))], [np.zeros((1, 3, 2, 2))]) == pytest.approx([0])


def test_a_backbone_against_torch() -> None:
    a, b, backbone = clip(0), clip(1), Backbone()
    assert isinstance(backbone, MapSource)
    frames = [torch.from_numpy(c.transpose(0, 3, 1, 2).copy()) for c in (a, b)]
    expected = oracle(backbone.maps(frames[0]), backbone.maps(frames[1])).numpy()
    np.testing.assert_allclose(perceptual_per_frame(a, b, backbone), expected, rtol=1e-4)
    assert perceptual(a, b, backbone) == pytest.approx(expected.mean(), rel=1e-4)


def test_identical_clips_and_growing_noise() -> None:
    a, backbone = clip(0), Backbone()
    noise = np.random.default_rng(2).normal(size=a.shape)
    noisy = [(a + s * noise).clip(0, 255).astype(np.uint8) for s in (0, 4, 12, 40)]
    values = [perceptual(a, other, backbone) for other in noisy]
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert values == sorted(values)


def test_a_batch_bounds_the_frames_in_the_backbone() -> None:
    a, b, backbone = clip(0), clip(1), Backbone()
    np.testing.assert_allclose(
        perceptual_per_frame(a, b, backbone, batch=2), perceptual_per_frame(a, b, Backbone()), rtol=1e-5
    )
    assert max(backbone.batches) == 2


def test_bad_clips() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        perceptual(clip(0) / 255, clip(1) / 255, Backbone())
    with pytest.raises(ConfigError, match="one shape"):
        perceptual(clip(0), clip(1, frames=4), Backbone())


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([np.ones((1, 2, 3, 3))], [], "got 1 and 0"),
        ([np.ones((1, 2, 3, 3))], [np.ones((1, 2, 3, 4))], "layer 0"),
        ([np.ones((1, 2))], [np.ones((1, 2))], "must be \\[N, C, h, w\\]"),
    ],
)
def test_bad_maps(a: list[Any], b: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unweighted(a, b)


def test_a_backbone_that_returns_something_else() -> None:
    class Wrong:
        def maps(self, frames: Tensor) -> Sequence[Tensor]:
            return ["no tensor"]  # type: ignore[list-item]

    with pytest.raises(ConfigError, match="one tensor"):
        perceptual(clip(0), clip(1), Wrong())
