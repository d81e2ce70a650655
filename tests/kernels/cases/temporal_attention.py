"""Cases of the temporal attention kernel, interpreted or on a GPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import BOUND, DEVICE, DTYPES, error, noise
from torch import Tensor

from diffeff.kernels.temporal_attention import reference, temporal_attention

# batch, frames, positions, heads, head_dim
SHAPES = [
    (1, 1, 3, 2, 40),
    (2, 8, 3, 2, 64),
    (1, 16, 5, 2, 72),
    (2, 24, 2, 1, 80),
    (1, 32, 2, 2, 128),
    (1, 16, 2, 1, 160),
]


def exact(q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
    return temporal_attention(q.double(), k.double(), v.double(), kernel="reference", **extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_awkward_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (noise(*shape, dtype=dtype, seed=n) for n in range(3))
    out = temporal_attention(q, k, v, kernel="triton")
    assert out.dtype is dtype
    assert error(out, exact(q, k, v)) < BOUND[dtype]


def test_views_of_one_projection_are_read_in_place_and_the_layout_is_kept() -> None:
    """[batch * positions, frames, 3 * channels], as motion modules hold it: no operand is contiguous."""
    fused = noise(2, 3, 8, 3, 2, 40)
    q, k, v = (fused[:, :, :, n].transpose(1, 2) for n in range(3))
    before = fused.clone()
    out = temporal_attention(q, k, v, kernel="triton")
    assert error(out, exact(q, k, v)) < BOUND[torch.float32]
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(fused, before)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_head_lambda(weight: float) -> None:
    q, k, v = (noise(1, 16, 3, 2, 40, seed=n) for n in range(3))
    head_lambda = torch.tensor([weight, 0.0], device=DEVICE)
    out = temporal_attention(q, k, v, head_lambda=head_lambda, kernel="triton")
    plain = temporal_attention(q, k, v, kernel="triton")
    assert torch.equal(out[..., 1, :], plain[..., 1, :])
    assert error(out[..., 0, :], (1 - weight) * plain[..., 0, :] + weight * v[..., 0, :]) < BOUND[torch.float32]
    assert torch.equal(out[..., 0, :], v[..., 0, :]) == (weight == 1.0)


def test_bias_and_weights_with_a_frame_that_sees_nothing() -> None:
    q, k, v = (noise(1, 8, 3, 2, 40, seed=n) for n in range(3))
    bias, weights = noise(2, 8, 8), torch.linspace(0.1, 3.0, 8, device=DEVICE)
    bias[1, 4], weights[2] = float("-inf"), 0.0
    out = temporal_attention(q, k, v, bias=bias, weights=weights, kernel="triton")
    assert error(out, exact(q, k, v, bias=bias, weights=weights)) < BOUND[torch.float32]
    assert torch.equal(out[:, 4, :, 1], torch.zeros_like(out[:, 4, :, 1]))
    assert error(out, exact(q, k, v, bias=bias)) > 1e-2


def test_other_frames_as_keys() -> None:
    q, k, v = noise(1, 16, 3, 2, 40), noise(1, 5, 3, 2, 40, seed=1), noise(1, 5, 3, 2, 40, seed=2)
    assert error(temporal_attention(q, k, v, scale=0.5, kernel="triton"), exact(q, k, v, scale=0.5)) < 2e-6


def test_nothing_to_do() -> None:
    q = noise(1, 8, 0, 2, 40)
    assert temporal_attention(q, q, q, kernel="triton").shape == q.shape
    assert reference(q, q, q, None, None, 1.0).shape == q.shape
