"""Degradations spoil by what they say, reproducibly, and strength 0 changes nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffeff.zoo.degrade import FRAME_KINDS, KINDS, MOST, degrade
from diffeff.zoo.world import HELD_OUT, render


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return render(HELD_OUT[:6], generator=seeded(1))


@pytest.mark.parametrize("kind", KINDS)
def test_more_strength_changes_more(kind: str, clips: Tensor) -> None:
    spoilt = [degrade(clips, kind, strength, seeded()) for strength in (0.0, 0.1, 0.4, 1.0)]
    changes = [float((each - clips).abs().mean()) for each in spoilt]
    assert changes[0] == 0
    assert torch.equal(spoilt[0], clips)
    assert changes[1] <= changes[2] < changes[3]
    assert all(each.min() >= 0 and each.max() <= 1 and each.shape == clips.shape for each in spoilt)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_draw_gives_the_same_clips(kind: str, clips: Tensor) -> None:
    assert torch.equal(degrade(clips, kind, 0.7, seeded(3)), degrade(clips, kind, 0.7, seeded(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_clip_has_its_own_strength(kind: str, clips: Tensor) -> None:
    strength = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    changed = (degrade(clips, kind, strength, seeded()) != clips).flatten(1).any(1)
    assert changed.tolist() == [False, True] * 3


def test_noise_has_the_standard_deviation_it_says(clips: Tensor) -> None:
    grey = torch.full_like(clips, 0.5)
    seen = degrade(grey, "noise", 0.1 / MOST["noise"], seeded())
    assert float((seen - grey).std()) == pytest.approx(0.1, rel=0.01)


def test_blur_has_the_sigma_it_says() -> None:
    point = torch.zeros(1, 1, 3, 65, 65)
    point[..., 32, 32] = 1
    seen = degrade(point, "blur", 2.0 / MOST["blur"] * 64 / 65, seeded())[0, 0, 0]
    axis = torch.arange(65.0) - 32
    assert float(seen.sum()) == pytest.approx(1, abs=1e-4)
    assert float((seen.sum(0) * axis.square()).sum()) == pytest.approx(4.0, rel=0.03)
    assert torch.allclose(seen, seen.T, atol=1e-7)


@pytest.mark.parametrize("dropped", [0, 2, 4, 8])
def test_repeat_repeats_that_many_frames(clips: Tensor, dropped: int) -> None:
    seen = degrade(clips, "repeat", dropped / 8, seeded())
    for clip in seen:
        assert sum(torch.equal(a, b) for a, b in pairwise(clip)) == dropped
    assert torch.equal(seen[:, 0], clips[:, 0])


def test_shuffle_keeps_every_frame(clips: Tensor) -> None:
    seen = degrade(clips, "shuffle", 1.0, seeded())
    assert torch.allclose(seen.sum(1), clips.sum(1), atol=1e-4)


def test_a_still_has_no_order_to_disturb(clips: Tensor) -> None:
    still = clips[:, :1]
    for kind in KINDS.keys() - set(FRAME_KINDS):
        assert torch.equal(degrade(still, kind, 1.0, seeded()), still)


def test_what_does_not_exist_is_refused(clips: Tensor) -> None:
    with pytest.raises(ValueError, match="noise, blur"):
        degrade(clips, "rust", 0.5, seeded())
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        degrade(clips, "noise", 1.5, seeded())
