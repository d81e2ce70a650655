"""KID and CMMD against double loops written from the papers, and against torchmetrics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.kernel import cmmd, gaussian_kernel, kid, mmd, polynomial_kernel
from diffeff.eval.metrics.result import Result

Floats = NDArray[np.float64]


def sample(n: int, dim: int, seed: int, shift: float = 0.0) -> Floats:
    return shift + np.random.default_rng(seed).normal(size=(n, dim))


def standard_error(result: Result) -> float:
    assert result.interval is not None
    return (result.interval.high - result.value) / 1.96


def slow_kid(x: Floats, y: Floats) -> float:
    """Equation 3 of Gretton et al. 2012, one pair at a time."""

    def k(a: Floats, b: Floats) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def slow_cmmd(x: Floats, y: Floats) -> float:
    """Section 4 of Jayasumana et al. 2024 with σ = 10, one pair at a time, each item with itself included."""

    def k(a: Floats, b: Floats) -> float:
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * 10**2))

    def mean(p: Floats, q: Floats) -> float:
        return sum(k(a, b) for a in p for b in q) / (len(p) * len(q))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_kid_is_the_double_loop() -> None:
    x, y = sample(23, 7, 0), sample(23, 7, 1, shift=0.3)
    assert kid(x, y).value == pytest.approx(slow_kid(x, y), rel=1e-10)


def test_kid_of_subsets_is_their_mean() -> None:
    x, y = sample(40, 5, 0), sample(31, 5, 1, shift=0.2)
    result = kid(x, y, subsets=7, subset_size=12, seed=5)
    random = np.random.default_rng(5)
    parts = []
    for _ in range(7):
        rows = [random.choice(n, 12, replace=False) for n in (40, 31)]
        parts.append(slow_kid(x[rows[0]], y[rows[1]]))
    assert result.value == pytest.approx(np.mean(parts), rel=1e-9)
    assert result.details["std_over_subsets"] == pytest.approx(np.std(parts), rel=1e-9)


def test_torchmetrics_agrees() -> None:
    functions = pytest.importorskip("torchmetrics.image.kid")
    x, y = sample(80, 9, 0), sample(80, 9, 1, shift=0.4)
    theirs = float(functions.poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))
    assert kid(x, y).value == pytest.approx(theirs, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_torchmetrics_metric_with_our_module_agrees() -> None:
    module = pytest.importorskip("torchmetrics.image.kid")

    class Flat(torch.nn.Module):
        num_features = 48

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double() / 255

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8, generator=generator)
    fake = torch.randint(0, 200, (50, 3, 4, 4), dtype=torch.uint8, generator=generator)
    metric = module.KernelInceptionDistance(feature=Flat(), subsets=2, subset_size=50)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    result = kid(Flat()(real).numpy(), Flat()(fake).numpy())
    assert result.value == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_kid_is_unbiased() -> None:
    """Two samples of one distribution: zero on average, and below zero about as often as above."""
    values = np.array([kid(sample(20, 4, 2 * i), sample(20, 4, 2 * i + 1)).value for i in range(300)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert 0.25 < (values < 0).mean() < 0.75


def test_cmmd_is_the_double_loop() -> None:
    x, y = sample(19, 6, 0), sample(14, 6, 1, shift=0.5)
    result = cmmd(x, y)
    assert result.value == pytest.approx(slow_cmmd(x, y), rel=1e-9)
    assert result.value > result.details["unbiased"]


def test_cmmd_does_not_see_length() -> None:
    x, y = sample(19, 6, 0), sample(14, 6, 1, shift=0.5)
    assert cmmd(3 * x, y / 7).value == pytest.approx(cmmd(x, y).value, rel=1e-9)


@pytest.mark.parametrize("measure", [kid, cmmd])
def test_distance_grows_with_the_shift(measure: Callable[..., Result]) -> None:
    x, base = sample(60, 8, 0, shift=1.0), sample(60, 8, 1, shift=1.0)
    step = np.eye(8)[0]
    values = [measure(x, base + s * step).value for s in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert values == sorted(values)
    assert values[-1] > 5 * abs(values[0])


def test_equal_sets() -> None:
    x = sample(30, 5, 0)
    assert cmmd(x, x.copy()).value == pytest.approx(0, abs=1e-9)
    assert (
        kid(x, x.copy()).value < 0
    )  # the unbiased estimator leaves out each item's equal to itself, but not to its twin


@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel(1.0)])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_do_not_show(kernel: Callable[[Floats, Floats], Floats], block: int) -> None:
    x, y = sample(33, 5, 0), sample(17, 5, 1)
    parts, whole = mmd(x, y, kernel, block=block), mmd(x, y, kernel, block=10**6)
    assert parts.biased == pytest.approx(whole.biased, rel=1e-9)
    assert parts.unbiased == pytest.approx(whole.unbiased, rel=1e-9)
    np.testing.assert_allclose(parts.reference, whole.reference, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("measure", [functools.partial(kid, subsets=10), cmmd])
def test_the_interval_is_about_the_spread_over_sets(measure: Callable[..., Result]) -> None:
    results = [measure(sample(100, 4, 2 * i, shift=0.5), sample(80, 4, 2 * i + 1, shift=1.0)) for i in range(150)]
    spread = np.std([r.value for r in results])
    assert np.median([standard_error(r) for r in results]) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("measure", [kid, cmmd])
def test_more_frames_of_the_same_clips_do_not_narrow_the_interval(measure: Callable[..., Result]) -> None:
    x, y, owners = sample(60, 4, 0, shift=0.5), sample(60, 4, 1, shift=1.0), np.repeat(np.arange(60), 5)
    once = standard_error(measure(x, y))
    copies = measure(x.repeat(5, axis=0), y.repeat(5, axis=0), owners=(owners, owners))
    assert standard_error(copies) == pytest.approx(once, rel=0.05)
    assert copies.n == 60
    assert standard_error(measure(x.repeat(5, axis=0), y.repeat(5, axis=0))) < 0.6 * once


def test_frames_of_one_clip_do_not_bias_the_unbiased_estimators() -> None:
    x, owners = sample(30, 4, 0), np.repeat(np.arange(30), 4)
    copies = x.repeat(4, axis=0)
    assert kid(copies, copies.copy(), owners=(owners, owners)).value == pytest.approx(kid(x, x.copy()).value)
    assert kid(copies, copies.copy()).value > kid(x, x.copy()).value
    first, again = cmmd(x, x.copy()), cmmd(copies, copies.copy(), owners=(owners, owners))
    assert again.details["unbiased"] == pytest.approx(first.details["unbiased"])


def test_the_influence_of_a_row_is_what_leaving_it_out_changes() -> None:
    x, y = sample(30, 3, 0), sample(25, 3, 1, shift=0.5)
    part = mmd(x, y, polynomial_kernel)
    whole = [mmd(np.delete(x, i, axis=0), y, polynomial_kernel).unbiased for i in range(len(x))]
    np.testing.assert_allclose(np.corrcoef(part.reference, whole)[0, 1], -1, atol=1e-3)


def test_the_interval_of_subsets_covers_their_choice() -> None:
    x, y = sample(400, 4, 0), sample(400, 4, 1, shift=0.3)
    few, many = kid(x, y, subsets=3, subset_size=40), kid(x, y, subsets=80, subset_size=40)
    assert standard_error(few) > standard_error(many)
    truth = kid(x, y).value
    assert many.interval is not None
    assert many.interval.low < truth < many.interval.high


def test_a_smaller_set_is_taken_whole_and_said_so() -> None:
    result = kid(sample(30, 4, 0), sample(12, 4, 1), features={"label": "sprites"})
    assert result.details["subset_size"] == 12
    assert result.details["subsets"] == 100
    assert result.label == "KID-sprites"
    assert any("subsets of 12" in note for note in result.notes)
    assert kid(sample(12, 4, 0), sample(12, 4, 1)).details["subsets"] == 1


def test_the_same_seed_gives_the_same_number() -> None:
    x, y = sample(50, 4, 0), sample(50, 4, 1)
    assert kid(x, y, subset_size=20, seed=1).to_dict() == kid(x, y, subset_size=20, seed=1).to_dict()
    assert kid(x, y, subset_size=20, seed=1).value != kid(x, y, subset_size=20, seed=2).value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(sample(1, 4, 0), sample(9, 4, 1)), "kid needs at least 2 items"),
        (lambda: cmmd(sample(9, 4, 0), sample(1, 4, 1)), "cmmd needs at least 2 items"),
        (lambda: kid(sample(9, 4, 0), sample(9, 3, 1)), "one feature source"),
        (lambda: kid(sample(9, 4, 0), sample(9, 4, 1), subset_size=1), "subset_size=1 must be at least 2"),
        (lambda: kid(sample(9, 4, 0), sample(9, 4, 1), subsets=0), "subsets=0 must be at least 1"),
        (lambda: cmmd(sample(9, 4, 0), sample(9, 4, 1), sigma=0), "sigma=0"),
        (lambda: cmmd(sample(9, 4, 0), np.zeros((9, 4))), "item 0 is all zeros"),
        (lambda: kid(sample(9, 4, 0), sample(9, 4, 1), owners=(np.arange(8), None)), "one owner each"),
        (lambda: mmd(sample(3, 4, 0), sample(3, 4, 1), polynomial_kernel, (np.zeros(3, int), None)), "no pairs"),
        (lambda: kid(sample(9, 4, 0), np.full((9, 4), np.inf)), "item 0 are not finite"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


# --- pairs ----------------------------------------------------------------------------------------------------------
def slow_paired_kid(x: Floats, y: Floats, items: NDArray[Any]) -> float:
    """The U-statistic over pairs (x, y) of Gretton et al. 2012, section 2.2, one pair of items at a time."""

    def k(a: Floats, b: Floats) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    apart = [(i, j) for i in range(len(x)) for j in range(len(x)) if items[i] != items[j]]
    return sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in apart) / len(apart)


def test_kid_of_pairs_is_the_double_loop_over_other_items() -> None:
    x = sample(18, 5, 0)
    y = x + 0.2 * sample(18, 5, 1)
    single, items = np.arange(18), np.repeat(np.arange(6), 3)
    assert kid(x, y, paired=True).value == pytest.approx(slow_paired_kid(x, y, single), rel=1e-9, abs=1e-12)
    grouped = kid(x, y, owners=(items, items), paired=True)
    assert grouped.value == pytest.approx(slow_paired_kid(x, y, items), rel=1e-9, abs=1e-12)
    assert grouped.n == 6
    blocked = mmd(x, y, polynomial_kernel, (items, items), 5, paired=True)
    assert blocked.unbiased == pytest.approx(grouped.value, rel=1e-9, abs=1e-12)
    assert blocked.biased == pytest.approx(mmd(x, y, polynomial_kernel).biased)


def test_kid_of_pairs_that_are_alike_is_about_zero_and_not_below() -> None:
    x = sample(200, 8, 2)
    y = x + 0.01 * sample(200, 8, 3)
    pairs, sets = kid(x, y, paired=True), kid(x, y)
    assert pairs.interval is not None
    assert sets.interval is not None
    assert pairs.interval.low < 0 < pairs.interval.high
    assert sets.interval.high < 0  # what happens to dependent sets without being told
    assert kid(x, x, paired=True).value == pytest.approx(0, abs=1e-12)


def test_kid_of_independent_sets_does_not_depend_on_pairing_in_the_mean() -> None:
    found = []
    for seed in range(40):
        x, y = sample(40, 4, seed), sample(40, 4, 1000 + seed, shift=0.5)
        found.append(kid(x, y, paired=True).value - kid(x, y).value)
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found)) + 1e-9


def test_pairs_keep_together_in_subsets() -> None:
    x = sample(60, 4, 5)
    result = kid(x, x, subset_size=20, subsets=30, paired=True)
    assert abs(result.value) < 0.5
    assert result.interval is not None
    assert result.interval.low < 0 < result.interval.high


def test_pairs_of_other_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="same number of items, got 5 and 6"):
        kid(sample(5, 3, 0), sample(6, 3, 1), paired=True)
