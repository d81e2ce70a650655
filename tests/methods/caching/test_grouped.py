"""Bands and groups of channels: parts of a tensor that are predicted apart, and put together again."""

from __future__ import annotations

import pytest
import torch
from scripted import drive
from torch import Tensor

from diffeff.methods import FeatureCache
from diffeff.methods.caching.fitted import Corrected, Fitted, FittedRow, Mixing
from diffeff.methods.caching.grouped import GROUPED, Banded, banded_sum, channel_sum, low_pass
from diffeff.methods.caching.predictor import Polynomial, combine
from diffeff.methods.caching.track import Moment, Snapshot

AT = [Moment(i, 1 - 0.1 * i, i, 9 - i, tuple(1 - 0.1 * n for n in range(10))) for i in range(10)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def history(*indices: int) -> list[Snapshot]:
    return [Snapshot(AT[i], (noise(1, 4, 2, 6, 8, seed=i),)) for i in indices]


def tensors(found: list[Snapshot]) -> list[Tensor]:
    return [s.tensors[0] for s in found if s.tensors[0] is not None]


@pytest.mark.parametrize("shape", [(2, 3, 8, 7), (1, 4, 3, 6, 8), (2, 12, 5)])
def test_the_low_band_is_a_projection_and_bands_sum_to_the_whole(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    low = low_pass(x, 0.4)
    assert torch.allclose(low_pass(low, 0.4), low, atol=1e-6)
    assert torch.allclose(low + (x - low), x)
    assert torch.allclose(low_pass(x - low, 0.4), torch.zeros_like(x), atol=1e-6)
    assert torch.allclose(low_pass(x, 2.0), x, atol=1e-6)
    assert torch.allclose(low_pass(torch.ones(shape), 0.0), torch.ones(shape), atol=1e-6)
    assert 0.05 < float(low.square().sum() / x.square().sum()) < 0.6


def test_bands_are_predicted_apart() -> None:
    """The low band held, the high one a line: each is what the predictor gives on that band alone."""
    found = history(2, 4)
    a, b = tensors(found)
    guess = Banded(Polynomial(0), Polynomial(1), 0.5).fill(found, [a, b], AT[5])
    high = combine([x - low_pass(x, 0.5) for x in (a, b)], (-0.5, 1.5))
    assert torch.allclose(guess, low_pass(b, 0.5) + high, atol=1e-5)


def test_equal_predictors_in_both_bands_are_the_plain_one_bit_for_bit() -> None:
    found = history(0, 2, 4)
    same = Banded(Polynomial(2), Polynomial(2)).fill(found, tensors(found), AT[5])
    times = [AT[i].time for i in (0, 2, 4)]
    assert torch.equal(same, combine(tensors(found), Polynomial(2).coefficients(times, AT[5].time)))


def test_three_bands_have_three_weights() -> None:
    x = noise(1, 2, 8, 8)
    found = banded_sum([x], [[1.0], [2.0], [3.0]], (0.3, 0.6))
    low, middle = low_pass(x, 0.3), low_pass(x, 0.6) - low_pass(x, 0.3)
    assert torch.allclose(found, low + 2 * middle + 3 * (x - low - middle), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 6, 4)])
def test_channels_have_the_weights_of_their_group(shape: tuple[int, ...]) -> None:
    a, b = noise(*shape), noise(*shape, seed=1)
    found = channel_sum([a, b], [[0.0, 1.0], [2.0, -1.0]], [0, 1, 1, 0])
    dim = 1 if len(shape) > 3 else 2
    for channel, group in enumerate([0, 1, 1, 0]):
        x, y, z = (t.select(dim, channel) for t in (a, b, found))
        assert torch.allclose(z, y if group == 0 else 2 * x - y)


def test_predictions_come_in_the_dtype_of_the_snapshots() -> None:
    x = noise(1, 4, 8, 8).bfloat16()
    assert banded_sum([x, x], [[0.0, 1.0], [1.0, 1.0]], (0.5,)).dtype is torch.bfloat16
    assert channel_sum([x, x], [[0.5, 0.5]], [0] * 4).dtype is torch.bfloat16


def test_fitted_rows_are_found_by_horizon_and_time_and_need_their_snapshots() -> None:
    rows = (
        FittedRow(0.9, 1, ((0.0, 2.0),)),
        FittedRow(0.3, 1, ((1.0, 3.0),)),
        FittedRow(0.3, 2, ((4.0, 5.0),)),
    )
    fitted = Fitted(rows, 2)
    assert fitted.row(0.4, 1, 2) is rows[1]
    assert fitted.row(0.4, 2, 2) is rows[2]
    assert fitted.row(0.3, 1, 1) is rows[0], "the nearer one needs two snapshots"
    assert fitted.row(0.3, 3, 2) is None
    found = history(2, 4)
    line = fitted.fill(found, tensors(found), AT[7])
    assert torch.allclose(line, combine(tensors(found), (-1.5, 2.5)), atol=1e-5)


def test_a_correction_mixes_channels_at_every_position() -> None:
    """Rank one: the first channel of the newest snapshot, doubled, into the last channel; nothing beyond horizon 1."""
    found = [Snapshot(AT[2], (noise(1, 3, 4, 4),)), Snapshot(AT[4], (noise(1, 3, 4, 4, seed=1),))]
    a, b = tensors(found)
    mixing = Mixing((((0.0,), (0.0,), (2.0,)),), (((1.0, 0.0, 0.0, 0.0, 0.0, 0.0),),), 2)
    inner = Banded(Polynomial(0), Polynomial(0))
    guess = Corrected(inner, mixing).fill(found, [a, b], AT[5])
    assert torch.equal(guess[:, :2], b[:, :2])
    assert torch.allclose(guess[:, 2], b[:, 2] + 2 * b[:, 0])
    assert torch.equal(Corrected(inner, mixing).fill(found, [a, b], AT[6]), b)


@pytest.mark.parametrize("name", sorted(GROUPED))
def test_constants_are_exact_for_grouped_predictors(name: str) -> None:
    still = noise(1, 4, 8, 8)
    seen = drive([FeatureCache(predictor=name, interval=3)], lambda x, branch, i: still, steps=12)
    assert len(seen.computed["cond"]) == 6
    assert all(torch.allclose(y, still, atol=1e-5) for y in seen.outputs["cond"].values())
