"""Sliced autoencoders: the plain result where slices are exact, and a word where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.live import live_activations
from diffeff.methods.memory.vae import slice_vae

COUNTS: list[int | None] = [None, 1, 2, 3, 5, 7, 1000]


def image_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        layers_per_block=1,
    ).eval()


def frame_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    ).eval()


def wan_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def ramp(*shape: int) -> Tensor:
    """Noise on a slope from corner to corner: statistics of a strip are then far from those of the whole."""
    torch.manual_seed(1)
    height, width = shape[-2:]
    return torch.randn(shape) + torch.linspace(-3, 3, height)[:, None] + torch.linspace(-5, 5, width)


def decode(vae: Any, z: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(z, **({"num_frames": 2} if "Temporal" in type(vae).__name__ else {})).sample
    return decoded


def encode(vae: Any, x: Tensor) -> Tensor:
    encoded: Tensor = vae.encode(x).latent_dist.parameters
    return encoded


@pytest.mark.parametrize("make", [image_vae, frame_vae])
@pytest.mark.parametrize("size", [(2, 8, 12), (4, 7, 5), (2, 1, 3)])
def test_strips_of_rows_are_exact(make: Any, size: tuple[int, ...]) -> None:
    vae, (batch, *rest) = make(), size
    z, x = ramp(batch, 4, *rest), ramp(batch, 3, *(4 * side + 4 for side in rest))
    decoded, encoded = decode(vae, z), encode(vae, x)
    for count in COUNTS:
        sliced = slice_vae(vae, Share(None, count))
        assert sliced.exact
        assert "strips" in sliced.note
        assert relative(decode(vae, z), decoded) < 1e-5, count
        assert relative(encode(vae, x), encoded) < 1e-5, count
        sliced.undo()
    assert torch.equal(decode(vae, z), decoded)
    assert torch.equal(encode(vae, x), encoded)


def test_a_budget_is_exact_too() -> None:
    vae, z = image_vae(), ramp(1, 4, 16, 12)
    decoded = decode(vae, z)
    for limit in (1, 300_000, 10**9):
        sliced = slice_vae(vae, Share(limit, None))
        assert sliced.exact
        assert relative(decode(vae, z), decoded) < 1e-5
        sliced.undo()


def test_the_peak_falls() -> None:
    vae, z, x = image_vae(), ramp(1, 4, 24, 24), ramp(1, 3, 96, 96)
    peaks = []
    for slices in (None, 16):
        undo = slice_vae(vae, Share(None, slices)).undo if slices else lambda: None
        for work, given in ((decode, z), (encode, x)):
            with live_activations() as live:
                work(vae, given)
            peaks.append(live.peak)
        undo()
    assert peaks[0] > 1.3 * peaks[2], peaks
    assert peaks[1] > 1.3 * peaks[3], peaks


@pytest.mark.parametrize("make", [image_vae, frame_vae, wan_vae])
def test_undo_leaves_nothing(make: Any) -> None:
    vae = make()
    before = {name: set(vars(module)) for name, module in vae.named_modules()}
    flags = {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}
    for share in (Share(None, 3), Share(10**6, None)):
        slice_vae(vae, share).undo()
        assert {name: set(vars(module)) for name, module in vae.named_modules()} == before
        assert {name: getattr(vae, name) for name in flags} == flags


def test_a_batch_of_videos_goes_one_by_one_and_stays_the_same() -> None:
    vae, z = wan_vae(), ramp(2, 4, 2, 4, 6)
    decoded = decode(vae, z)
    with live_activations() as plain:
        decode(vae, z)
    sliced = slice_vae(vae, Share(None, None))
    assert sliced.exact
    assert "one item" in sliced.note
    with live_activations() as live:
        assert relative(decode(vae, z), decoded) < 1e-5
    sliced.undo()
    assert live.peak < 0.8 * plain.peak


def test_videos_are_tiled_under_a_budget_only_and_said_to_be_inexact() -> None:
    vae, z = wan_vae(), ramp(1, 4, 2, 12, 16)
    decoded = decode(vae, z)
    sliced = slice_vae(vae, Share(300_000, None))
    assert not sliced.exact
    assert "tiles" in sliced.note
    assert vae.use_tiling
    tiled = decode(vae, z)
    assert tiled.shape == decoded.shape
    assert relative(tiled, decoded) > 1e-5
    sliced.undo()
    roomy = slice_vae(vae, Share(10**12, None))
    assert relative(decode(vae, z), decoded) < 1e-5
    roomy.undo()
    assert torch.equal(decode(vae, z), decoded)


VIDEO = {
    "AutoencoderKLCogVideoX": {
        "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "latent_channels": 4,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    },
}


@pytest.mark.parametrize("name", VIDEO)
def test_other_video_autoencoders(name: str) -> None:
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**VIDEO[name]).eval()
    z = ramp(2, vae.config.latent_channels, 2, 6, 4)
    decoded = decode(vae, z)
    exact = slice_vae(vae, Share(None, 3))
    assert exact.exact
    assert relative(decode(vae, z), decoded) < 1e-5
    exact.undo()
    tiled = slice_vae(vae, Share(1, None))
    assert not tiled.exact
    assert decode(vae, z).shape == decoded.shape
    tiled.undo()
    assert torch.equal(decode(vae, z), decoded)


def test_autoencoders_it_does_not_know_are_left_whole() -> None:
    class Other(nn.Module):
        pass

    sliced = slice_vae(Other(), Share(1, 4))
    assert sliced.exact
    assert "Other is left whole" in sliced.note
    sliced.undo()


def test_with_gradients_layers_run_their_plain_forward() -> None:
    vae = image_vae()

    def gradient() -> Tensor:
        z = ramp(1, 4, 8, 8).requires_grad_()
        with torch.enable_grad():
            vae.decode(z).sample.square().sum().backward()
        assert z.grad is not None
        return z.grad

    plain = gradient()
    sliced = slice_vae(vae, Share(None, 2))
    assert relative(gradient(), plain) < 1e-5
    sliced.undo()
