"""Precision and recall: disjoint and equal sets, a set inside another, a double loop, copies of one item."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.manifold import items_inside, precision_recall, radii
from diffeff.zoo.score import wilson

Floats = NDArray[np.float64]


def sample(n: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Floats:
    return shift + scale * np.random.default_rng(seed).normal(size=(n, dim))


def slow_share(tested: Floats, centres: Floats, k: int) -> float:
    """Equations 1 and 2 of Kynkäänniemi et al. 2019, one item at a time."""
    reach = [sorted(np.linalg.norm(c - o) for o in centres)[k] for c in centres]
    return float(
        np.mean([any(np.linalg.norm(t - c) <= r for c, r in zip(centres, reach, strict=True)) for t in tested])
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 1024])
def test_the_double_loop(k: int, block: int) -> None:
    real, fake = sample(40, 3, 0), sample(31, 3, 1, shift=1.2)
    precision, recall = precision_recall(real, fake, k=k, block=block)
    assert precision.value == pytest.approx(slow_share(fake, real, k))
    assert recall.value == pytest.approx(slow_share(real, fake, k))
    assert 0 < precision.value < 1


def test_equal_sets_are_all_inside() -> None:
    a = sample(200, 16, 0).astype(np.float32)
    assert [r.value for r in precision_recall(a, a.copy())] == [1, 1]


def test_disjoint_sets_share_nothing() -> None:
    assert [r.value for r in precision_recall(sample(50, 8, 0), sample(50, 8, 1, shift=100))] == [0, 0]


def test_one_mode_of_two_is_precise_but_covers_half() -> None:
    modes = np.concatenate([sample(100, 4, 0), sample(100, 4, 1, shift=50)])
    precision, recall = precision_recall(modes, sample(200, 4, 2))
    assert precision.value > 0.8
    assert recall.value == pytest.approx(0.5, abs=0.1)


def test_copies_of_one_item_far_from_the_origin_are_inside_each_other() -> None:
    """All radii are 0 here: rounding must not put a copy outside."""
    copies = np.tile(sample(1, 512, 0, shift=30), (8, 1))
    assert [r.value for r in precision_recall(copies, copies[::-1].copy())] == [1, 1]


def test_radii_are_those_of_the_neighbours_on_a_line() -> None:
    line = np.arange(5, dtype=float)[:, None]
    np.testing.assert_allclose(radii(line, 1), [1, 1, 1, 1, 1])
    np.testing.assert_allclose(radii(line, 2), [4, 1, 1, 1, 4])
    assert items_inside(np.array([[-2.0], [-2.5], [2.2], [6.0]]), line, radii(line, 2)) == 3


def test_the_intervals_are_wilsons() -> None:
    real, fake = sample(40, 3, 0), sample(31, 3, 1, shift=0.7)
    precision, recall = precision_recall(real, fake, features={"label": "sprites"})
    for result, trials in ((precision, 31), (recall, 40)):
        assert result.interval is not None
        assert (result.interval.low, result.interval.high) == wilson(round(result.value * trials), trials)
        assert result.details["tested"] == trials
        assert any("differ in number" in note for note in result.notes)
    assert (precision.label, recall.label) == ("precision-sprites", "recall-sprites")
    assert precision_recall(real, real)[0].notes == ()


def test_frames_of_one_clip_count_once_in_the_interval() -> None:
    real, fake = sample(120, 3, 0), sample(120, 3, 1, shift=1.2)
    owners = np.repeat(np.arange(20), 6)
    alone, together = precision_recall(real, fake)[0], precision_recall(real, fake, owners=(owners, owners))[0]
    assert together.value == alone.value
    assert together.interval is not None
    assert (together.interval.low, together.interval.high) == wilson(round(20 * together.value), 20)


def test_frames_of_one_clip_are_not_each_others_neighbours() -> None:
    """Each item three times over: all radii would be 0 at k = 2, and a set drawn alike would be outside."""
    real, fake, owners = sample(60, 3, 0), sample(60, 3, 1), np.repeat(np.arange(60), 3)
    copies = real.repeat(3, axis=0), fake.repeat(3, axis=0)
    alone = [r.value for r in precision_recall(real, fake, k=1)]
    assert [r.value for r in precision_recall(*copies, k=3, owners=(owners, owners))] == alone
    assert [r.value for r in precision_recall(*copies, k=2)] == [0, 0]


@pytest.mark.parametrize("k", [0, 5, 9])
def test_k_must_leave_a_neighbour(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k={k} must be from 1 to 4"):
        precision_recall(sample(9, 2, 0), sample(5, 2, 1), k=k)
    with pytest.raises(ConfigError, match="k=3 must be from 1 to 2"):
        precision_recall(sample(9, 2, 0), sample(5, 2, 1), owners=(None, np.array([7, 7, 7, 1, 2])))


def test_sets_of_other_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="one feature source"):
        precision_recall(sample(9, 2, 0), sample(9, 3, 1))
