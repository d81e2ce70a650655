"""Cases of the group norm kernels, interpreted or on a GPU, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import BOUND, DTYPES, error, noise

from diffeff.kernels.group_norm import group_norm_two_pass

SHAPES = [
    ((1, 8, 7, 9), 2, 1),
    ((2, 12, 5, 3), 4, 2),
    ((1, 4, 1, 31), 2, 1),
    ((2, 6, 2, 3, 5), 2, 1),
    ((1, 8, 50, 45), 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "frames"), SHAPES)
def test_awkward_shapes_on_a_ramp(shape: tuple[int, ...], groups: int, frames: int, dtype: torch.dtype) -> None:
    """The ramp gives every part of the map another mean: statistics of parts are visibly not those of the whole."""
    x = (noise(*shape) + torch.linspace(0, 30, shape[-1], device=noise(1).device)).to(dtype)
    weight, bias = noise(shape[1], seed=1), noise(shape[1], seed=2)
    out = group_norm_two_pass(x, groups, weight, bias, silu=True, frames=frames, kernel="triton")
    video = x.double().unflatten(0, (-1, frames)).transpose(1, 2)
    exact = F.silu(F.group_norm(video, groups, weight.double(), bias.double())).transpose(1, 2).flatten(0, 1)
    assert out.dtype is dtype
    assert error(out, exact) < BOUND[dtype]


def test_channels_last_stays_channels_last() -> None:
    x = noise(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    out = group_norm_two_pass(x, 4, kernel="triton")
    assert out.stride() == x.stride()
    assert error(out, F.group_norm(x.double(), 4)) < BOUND[torch.float32]


def test_views_of_frames_and_of_channels() -> None:
    x = noise(2, 3, 8, 5, 7)
    for view in (x.transpose(1, 2), x[:, 1], x[:, :, 2:6].flatten(0, 1)):
        out = group_norm_two_pass(view, view.shape[1] // 2, kernel="triton")
        assert error(out, F.group_norm(view.double(), view.shape[1] // 2)) < BOUND[torch.float32]


def test_a_large_mean_does_not_cancel() -> None:
    x = noise(1, 4, 40, 60) + 1e4
    out = group_norm_two_pass(x, 1, kernel="triton")
    assert error(out, F.group_norm(x.double(), 1)) < 1e-4
