"""Fréchet distance: closed forms, scipy's matrix square root, torchmetrics, singular sets, streaming and merging."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg

from diffeff.errors import ConfigError
from diffeff.eval.metrics.frechet import Moments, frechet, frechet_distance
from diffeff.eval.metrics.result import Result

Floats = NDArray[np.float64]


def gaussian(mean: Any, covariance: Any, n: int = 100) -> Moments:
    """Moments as if exactly these had been measured on `n` items."""
    return Moments(n, np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float) * (n - 1))


def sample(n: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Floats:
    return shift + scale * np.random.default_rng(seed).normal(size=(n, dim))


def standard_error(result: Result) -> float:
    assert result.interval is not None
    return (result.interval.high - result.value) / 1.96


def by_square_root(a: Floats, b: Floats) -> float:
    """The textbook formula, with scipy's Schur square root: an independent way to the same number."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root.real))


def test_equal_covariances_leave_the_means() -> None:
    covariance = [[2.0, 0.5], [0.5, 1.0]]
    assert frechet_distance(gaussian([0, 0], covariance), gaussian([3, 4], covariance)) == pytest.approx(25)


def test_diagonal_covariances_closed_form() -> None:
    a, b = gaussian([0, 0, 1], np.diag([1.0, 4.0, 9.0])), gaussian([1, 0, 1], np.diag([16.0, 1.0, 9.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + (1 - 4) ** 2 + (2 - 1) ** 2)


def test_scaled_covariance_closed_form() -> None:
    """Between N(0, C) and N(0, s² C) the distance is (1 − s)² Tr C, for any C."""
    root = np.random.default_rng(0).normal(size=(6, 6))
    covariance = root @ root.T
    distance = frechet_distance(gaussian(np.zeros(6), covariance), gaussian(np.zeros(6), 9 * covariance))
    assert distance == pytest.approx(4 * np.trace(covariance))


def test_rotated_covariances_of_the_plane_closed_form() -> None:
    """In the plane Tr (AB)^½ = (Tr AB + 2 (det AB)^½)^½."""
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    a, b = np.diag([5.0, 0.3]), turn @ np.diag([2.0, 1.0]) @ turn.T
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    distance = frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b))
    assert distance == pytest.approx(np.trace(a) + np.trace(b) - 2 * root)


def test_singular_covariances_closed_form() -> None:
    """Two lines at an angle: one singular value, the product of their lengths and the cosine between them."""
    u, v = np.array([1.0, 0, 0]), np.array([0.6, 0.8, 0])
    distance = frechet_distance(gaussian(np.zeros(3), np.outer(u, u)), gaussian(np.zeros(3), 4 * np.outer(v, v)))
    assert distance == pytest.approx(1 + 4 - 2 * 2 * 0.6, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 200, 12), (40, 500, 63), (64, 70, 63)])
def test_the_textbook_formula(n: int, m: int, dim: int) -> None:
    a, b = sample(n, dim, 0), sample(m, dim, 1, shift=0.3, scale=1.5)
    assert frechet(a, b).value == pytest.approx(by_square_root(a, b), rel=1e-6)


def test_torchmetrics_agrees() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Projection(torch.nn.Module):
        num_features = 8

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).float() / 255 @ self.weight

    module = Projection()
    generator = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (90, 3, 4, 4), dtype=torch.uint8, generator=generator)
    fake = torch.randint(0, 180, (70, 3, 4, 4), dtype=torch.uint8, generator=generator)
    metric = fid.FrechetInceptionDistance(feature=module).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    result = frechet(module(real).numpy(), module(fake).numpy())
    assert result.value == pytest.approx(float(metric.compute()), rel=1e-5)
    assert result.value > 0.1


@pytest.mark.parametrize("n", [2, 10, 200])
def test_equal_sets_are_at_no_distance(n: int) -> None:
    a = sample(n, 16, 0)
    assert 0 <= frechet(a, a.copy()).value < 1e-10
    assert 0 <= frechet_distance(Moments.from_features(a), Moments.from_features(a)) < 1e-10


def test_distance_is_symmetric_and_grows_with_the_shift() -> None:
    a = sample(50, 8, 0)
    shifted = [sample(60, 8, 1, shift=s) for s in (0.0, 0.2, 0.5, 1.0, 2.0)]
    there, back = [frechet(a, b).value for b in shifted], [frechet(b, a).value for b in shifted]
    np.testing.assert_allclose(there, back, rtol=1e-10)
    assert there == sorted(there)


def test_rows_and_moments_give_the_same_number() -> None:
    """The short way round for few items is the same distance as the covariance's."""
    a, b = sample(30, 64, 0), sample(45, 64, 1, shift=0.1)
    slow = frechet_distance(Moments.from_features(a), Moments.from_features(b))
    assert frechet(a, b).value == pytest.approx(slow, rel=1e-9)


def test_the_covariance_is_numpys() -> None:
    rows = sample(3001, 7, 0, shift=1e4)
    moments = Moments.from_features(rows.astype(np.float32))
    np.testing.assert_allclose(
        moments.covariance, np.cov(rows.astype(np.float32).astype(float), rowvar=False), rtol=1e-9
    )
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-7)
    assert moments.n == 3001


@pytest.mark.parametrize("cut", [0, 1, 100, 299, 300])
def test_merging_is_the_whole(cut: int) -> None:
    rows = sample(300, 5, 0, shift=50)
    halves = [Moments.from_blocks([rows[part]], 5) for part in (slice(0, cut), slice(cut, None))]
    merged, whole = halves[0].merged(halves[1]), Moments.from_features(rows)
    assert merged.n == whole.n
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9)


def test_a_stream_is_read_once_and_in_blocks(tmp_path: Path) -> None:
    rows = sample(2500, 6, 0).astype(np.float32)
    path = tmp_path / "rows.f32"
    rows.tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=rows.shape)

    def stream() -> Iterator[NDArray[Any]]:
        for start in range(0, len(mapped), 1024):
            yield mapped[start : start + 1024]

    a, b = Moments.from_blocks(stream(), 6), Moments.from_features(rows)
    np.testing.assert_array_equal(a.scatter, b.scatter)
    assert frechet(mapped, rows).value < 1e-10


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    rows = sample(60_000, 16, 0).astype(np.float32)  # 7.7 MB in float64
    rows.tofile(tmp_path / "rows.f32")
    mapped = np.memmap(tmp_path / "rows.f32", dtype=np.float32, mode="r", shape=rows.shape)
    tracemalloc.start()
    try:
        frechet(mapped, mapped[:30_000])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6


def test_saved_moments_come_back_bit_for_bit(tmp_path: Path) -> None:
    moments = Moments.from_features(sample(20, 4, 0))
    np.savez(tmp_path / "stats.npz", **moments.to_arrays())
    with np.load(tmp_path / "stats.npz") as arrays:
        back = Moments.from_arrays(arrays)
    assert back.n == 20
    np.testing.assert_array_equal(back.mean, moments.mean)
    np.testing.assert_array_equal(back.scatter, moments.scatter)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(2)}, "no array n, scatter"),
        ({"n": np.array([3]), "mean": np.zeros(2), "scatter": np.zeros((3, 3))}, "scatter \\(3, 3\\)"),
    ],
)
def test_broken_statistics_are_refused(arrays: dict[str, NDArray[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Moments.from_arrays(arrays)


@pytest.mark.parametrize(
    ("n", "dim", "shift", "widest"), [(150, 4, 0.5, 1.3), (60, 16, 0.3, 1.6), (40, 60, 0.3, 1.8), (300, 8, 0.2, 1.3)]
)
def test_the_interval_is_about_the_spread_over_sets(n: int, dim: int, shift: float, widest: float) -> None:
    """The standard error against the scatter over many pairs of sets; some bias to the safe side is let pass."""
    results = [frechet(sample(n, dim, 2 * i), sample(n, dim, 2 * i + 1, shift=shift)) for i in range(80)]
    spread = np.std([r.value for r in results], ddof=1)
    assert 0.75 < np.median([standard_error(r) for r in results]) / spread < widest


def test_the_influence_of_a_row_is_what_leaving_it_out_changes() -> None:
    """The jackknife, the long way round: the variance of the distance over sets with one row missing."""
    a, b = sample(60, 5, 0), sample(50, 5, 1, shift=0.4)
    without_a = [frechet(np.delete(a, i, axis=0), b).value for i in range(len(a))]
    without_b = [frechet(a, np.delete(b, i, axis=0)).value for i in range(len(b))]
    variance = sum((len(v) - 1) * np.var(v) for v in (without_a, without_b))
    assert standard_error(frechet(a, b)) == pytest.approx(np.sqrt(variance), rel=0.05)


def test_more_frames_of_the_same_clips_do_not_narrow_the_interval() -> None:
    a, b = sample(80, 4, 0), sample(80, 4, 1, shift=0.5)
    frames, owners = 6, np.repeat(np.arange(80), 6)
    once = frechet(a, b)
    copies = frechet(a.repeat(frames, axis=0), b.repeat(frames, axis=0), owners=(owners, owners))
    assert copies.value == pytest.approx(once.value, rel=0.02)
    assert standard_error(copies) == pytest.approx(standard_error(once), rel=0.05)
    assert copies.n == 80
    assert copies.details["n_subject"] == 480
    naive = frechet(a.repeat(frames, axis=0), b.repeat(frames, axis=0))
    assert standard_error(naive) == pytest.approx(standard_error(once) / np.sqrt(frames), rel=0.1)


@pytest.mark.parametrize(("n", "dim"), [(2, 1), (2, 5), (9, 1), (5, 40)])
def test_the_smallest_sets(n: int, dim: int) -> None:
    result = frechet(sample(n, dim, 0), sample(n, dim, 1))
    assert np.isfinite(result.value)
    assert result.interval is not None
    assert result.interval.low <= result.value <= result.interval.high


@pytest.mark.parametrize(("n", "dim"), [(4, 9), (40, 3)])
def test_a_set_of_copies_has_no_spread(n: int, dim: int) -> None:
    copies, others = np.ones((n, dim)), sample(n, dim, 0)
    expected = ((others.mean(axis=0) - 1) ** 2).sum() + np.trace(np.atleast_2d(np.cov(others, rowvar=False)))
    assert frechet(copies, others).value == pytest.approx(expected)
    assert frechet(copies, 2 * copies).value == pytest.approx(dim)


def test_what_a_reader_must_know_is_in_the_notes() -> None:
    few = frechet(sample(30, 64, 0), sample(40, 64, 1), features={"label": "sprites"})
    assert few.label == "FID-sprites"
    assert any("KID" in note for note in few.notes)
    assert any("singular" in note for note in few.notes)
    assert frechet(sample(2048, 3, 0), sample(2048, 3, 1)).notes == ()
    assert frechet(sample(9, 3, 0), sample(8, 3, 1), metric="fvd").metric == "fvd"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(sample(1, 4, 0), sample(9, 4, 1)), "at least 2 items on each side, got 1"),
        (lambda: frechet(sample(9, 4, 0), sample(9, 5, 1)), "one feature source"),
        (lambda: frechet(sample(9, 4, 0), np.full((9, 4), np.nan)), "item 0 are not finite"),
        (lambda: frechet(sample(9, 4, 0), np.zeros((9, 4), dtype=np.int64)), "floating-point"),
        (lambda: frechet(np.zeros(4), np.zeros(4)), "items, dimensions"),
        (lambda: frechet(sample(9, 4, 0), sample(9, 4, 1), owners=(None, np.arange(8))), "one owner each"),
        (lambda: frechet(sample(9, 4, 0), sample(9, 4, 1), owners=(np.zeros(9, int), None)), "all rows are of one"),
        (lambda: Moments.from_features(sample(1, 4, 0)).covariance, "at least 2"),
        (lambda: frechet_distance(Moments.empty(3), Moments.empty(3)), "at least 2 items"),
        (lambda: Moments.empty(3).merged(Moments.empty(4)), "one feature source"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
