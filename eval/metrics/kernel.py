"""Maximum mean discrepancy of two sets of features: KID with a polynomial kernel, CMMD with a Gaussian one.

Neither assumes that features are Gaussian, and both say something at a few hundred items, where a Fréchet distance
does not. Intervals come from the first-order (Hoeffding 1948) variance of the estimator: the influence of an item is
h(x) = 2 (E k(x, x') − E k(x, y)). They are a little too wide where the two sets are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.result import Result
from diffeff.eval.metrics.rows import (
    BLOCK,
    Floats,
    Owners,
    Pair,
    blocks,
    check_pair,
    counts_of,
    interval_of,
    items_of,
    owner_numbers,
    variance_of_mean,
    whole,
)
from diffeff.eval.metrics.table import METRICS

__all__ = ["cmmd", "gaussian_kernel", "kid", "mmd", "polynomial_kernel"]

Kernel = Callable[[Floats, Floats], Floats]
Numbers = tuple[NDArray[np.int64], NDArray[np.int64]]


def kid(
    reference: NDArray[Any],
    subject: NDArray[Any],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    features: Mapping[str, Any] | None = None,
    owners: Pair = (None, None),
    paired: bool = False,
) -> Result:
    """Kernel Inception distance of two sets of features [N, D]: unbiased at any N, so it may come out below zero.

    The mean over random subsets of the unbiased squared discrepancy with k(x, y) = (x·y / D + 1)³. Subsets are no
    larger than the smaller side; when they would be all of both sides, one is enough. Not multiplied by 100 or 1000,
    as some papers do. `owners` says which item each row is of (reference first) where items have several rows.

    `paired` says that the i-th items of both sides belong together, as plan and plain do that start from one seed.
    Their pairs are then left out of the cross term, too: they are alike, and would push the value below zero.
    Memory: one subset. Raises ConfigError for fewer than 2 items and for options out of range.
    Source: Bińkowski, Sutherland, Arbel, Gretton 2018.
    """
    check_pair(reference, subject, "kid", owners)
    for name, option, least in (("subsets", subsets, 1), ("subset_size", subset_size, 2)):
        if option < least:
            raise ConfigError(f"kid: {name}={option} must be at least {least}")
    size = min(subset_size, len(reference), len(subject))
    everything = size == len(reference) == len(subject)
    numbers = _numbers(owners, reference, subject)
    if paired and not np.array_equal(np.unique(numbers[0]), np.unique(numbers[1])):
        raise ConfigError(f"kid: paired sides have the same number of items, got {_items(numbers[0], numbers[1])}")
    values, influences = _over_subsets(
        (reference, subject), numbers, 1 if everything else subsets, size, seed, paired=paired
    )
    value, spread = float(values.mean()), float(values.std())
    variance = _joint_variance(influences, numbers) if paired else _variance(influences, owners)
    variance += 0 if everything else spread**2 / len(values)
    details = counts_of(reference, subject) | {"subsets": len(values), "subset_size": size, "std_over_subsets": spread}
    details |= {"paired": True} if paired else {}
    return METRICS["kid"].result(
        value,
        items_of(owners[1], subject),
        interval=interval_of(value, variance),
        features=features,
        details=details,
        notes=() if size == subset_size else (f"subsets of {size}, not {subset_size}: there are no more",),
    )


def cmmd(
    reference: NDArray[Any],
    subject: NDArray[Any],
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    features: Mapping[str, Any] | None = None,
    owners: Pair = (None, None),
) -> Result:
    """Squared discrepancy of image embeddings under a Gaussian kernel, times 1000: CMMD when they are CLIP's.

    Rows are scaled to length 1, k(x, y) = exp(−|x − y|² / 2σ²), and the biased estimator is taken (it counts each item
    with itself), all as published; at N items the bias is about 1000 (1 − mean k) / N on each side, and
    `details["unbiased"]` is without it. Published numbers are of CLIP ViT-L/14 at 336 pixels: others do not compare.
    `owners` as in `kid`. Time O(N² D), memory O(N). Raises ConfigError for fewer than 2 items and for a row of zeros.
    Source: Jayasumana et al. 2024.
    """
    check_pair(reference, subject, "cmmd", owners)
    if not (sigma > 0 and scale > 0):
        raise ConfigError(f"cmmd: sigma={sigma} and scale={scale} must be above 0")
    for rows in (reference, subject):
        _check_directions(rows)
    part = mmd(reference, subject, gaussian_kernel(sigma), owners)
    value = scale * part.biased
    variance = scale**2 * _variance((part.reference, part.subject), owners)
    return METRICS["cmmd"].result(
        value,
        items_of(owners[1], subject),
        interval=interval_of(value, variance, floor=0.0),
        features=features,
        details=counts_of(reference, subject) | {"unbiased": scale * part.unbiased, "sigma": sigma, "scale": scale},
    )


@dataclass(frozen=True, eq=False)
class Discrepancy:
    """Squared maximum mean discrepancy of two sets, and each row's influence on it, [N] and [M]."""

    unbiased: float
    biased: float
    reference: Floats
    subject: Floats


def mmd(
    x: NDArray[Any],
    y: NDArray[Any],
    kernel: Kernel,
    owners: Pair = (None, None),
    block: int = BLOCK,
    *,
    paired: bool = False,
) -> Discrepancy:
    """Squared maximum mean discrepancy of [N, D] and [M, D], in blocks: maps of files are never in memory whole.

    The unbiased one leaves out the pairs of one item: each row with itself, and the frames of a clip among each other,
    which are alike and would make every set look narrower than it is; `paired` does the same to the pairs of equal
    owners across the sides. Raises ConfigError when no pairs are left.
    Source: Gretton et al. 2012, equations 3 (unbiased; for pairs, the form under equation 4) and 5 (biased).
    """
    n, m = len(x), len(y)
    xx, yy = _within(x, owners[0], kernel, block), _within(y, owners[1], kernel, block)
    numbers = _numbers(owners, x, y) if paired else None
    xy = _across(x, y, numbers, kernel, block)
    biased = xx.everything / n**2 + yy.everything / m**2 - 2 * xy.everything / (n * m)
    of_x = 2 * (xx.others / xx.pairs - xy.rows / xy.row_pairs)
    of_y = 2 * (yy.others / yy.pairs - xy.columns / xy.column_pairs)
    return Discrepancy(xx.mean + yy.mean - 2 * xy.mean, biased, of_x, of_y)


def polynomial_kernel(x: Floats, y: Floats) -> Floats:
    """(x·y / D + 1)³, [N, M]: the kernel of KID."""
    linear: Floats = x @ y.T / x.shape[1] + 1.0
    return linear * linear * linear  # many times faster than a power of 3


def gaussian_kernel(sigma: float) -> Kernel:
    """exp(−|x − y|² / 2σ²) of rows scaled to length 1, [N, M]: the kernel of CMMD at σ = 10."""

    def kernel(x: Floats, y: Floats) -> Floats:
        cosines = _unit(x) @ _unit(y).T  # |x − y|² = 2 − 2 cos
        matrix: Floats = np.exp((cosines - 1.0) / sigma**2)
        return matrix

    return kernel


@dataclass(frozen=True, eq=False)
class _Within:
    """Sums of a kernel matrix of a set with itself: of all of it, and of each row with the rows of other items."""

    everything: float
    others: Floats
    pairs: Floats

    @property
    def mean(self) -> float:
        return float(self.others.sum() / self.pairs.sum())


def _within(x: NDArray[Any], owners: Owners | None, kernel: Kernel, block: int) -> _Within:
    numbers = owner_numbers(owners, x)
    pairs = len(x) - np.bincount(numbers)[numbers].astype(np.float64)
    if not pairs.all():
        raise ConfigError("all rows are of one item: there are no pairs to compare. Take more items, or larger subsets")
    everything, others = 0.0, np.zeros(len(x))
    for i in range(0, len(x), block):
        for j in range(0, len(x), block):
            part = kernel(_wide(x, i, block), _wide(x, j, block))
            everything += float(part.sum())
            part[numbers[i : i + block, None] == numbers[None, j : j + block]] = 0.0
            others[i : i + block] += part.sum(axis=1)
    return _Within(everything, others, pairs)


@dataclass(frozen=True, eq=False)
class _Across:
    """Sums of a kernel matrix [N, M]: of all of it, and over its rows and columns without the pairs of one item."""

    everything: float
    rows: Floats
    columns: Floats
    row_pairs: Floats
    column_pairs: Floats

    @property
    def mean(self) -> float:
        return float(self.rows.sum() / self.row_pairs.sum())


def _across(
    x: NDArray[Any],
    y: NDArray[Any],
    numbers: Numbers | None,
    kernel: Kernel,
    block: int,
) -> _Across:
    rows, columns, everything = np.zeros(len(x)), np.zeros(len(y)), 0.0
    row_pairs, column_pairs = _apart(len(x), len(y), numbers)
    for i in range(0, len(x), block):
        for j in range(0, len(y), block):
            part = kernel(_wide(x, i, block), _wide(y, j, block))
            everything += float(part.sum())
            if numbers is not None:
                part[numbers[0][i : i + block, None] == numbers[1][None, j : j + block]] = 0.0
            rows[i : i + block] += part.sum(axis=1)
            columns[j : j + block] += part.sum(axis=0)
    return _Across(everything, rows, columns, row_pairs, column_pairs)


def _apart(n: int, m: int, numbers: Numbers | None) -> tuple[Floats, Floats]:
    """With how many rows of other items each row is paired, on both sides."""
    if numbers is None:
        return np.full(n, float(m)), np.full(m, float(n))
    most = int(max(numbers[0].max(), numbers[1].max())) + 1
    there, here = np.bincount(numbers[1], minlength=most), np.bincount(numbers[0], minlength=most)
    pairs = m - there[numbers[0]].astype(np.float64), n - here[numbers[1]].astype(np.float64)
    if not (pairs[0].all() and pairs[1].all()):
        raise ConfigError("all rows are of one item: there are no pairs to compare. Take more items, or larger subsets")
    return pairs


def _wide(features: NDArray[Any], start: int, block: int) -> Floats:
    return np.asarray(features[start : start + block], dtype=np.float64)


def _over_subsets(
    sides: tuple[NDArray[Any], NDArray[Any]],
    numbers: Numbers,
    subsets: int,
    size: int,
    seed: int,
    *,
    paired: bool,
) -> tuple[Floats, tuple[Floats, Floats]]:
    """The discrepancy of each subset, and each row's mean influence; NaN for a row that was never drawn."""
    random = np.random.default_rng(seed)
    totals = [np.zeros((2, len(rows))) for rows in sides]  # influence, times drawn
    values = []
    for _ in range(subsets):
        # In file order: a memory map is read forwards.
        a, b = (np.sort(random.choice(len(rows), size, replace=False)) for rows in sides)
        kept = numbers[0][a], numbers[1][b]
        part = mmd(whole(sides[0][a]), whole(sides[1][b]), polynomial_kernel, kept, paired=paired)
        values.append(part.unbiased)
        totals[0][:, a] += np.stack([part.reference, np.ones(size)])
        totals[1][:, b] += np.stack([part.subject, np.ones(size)])
    with np.errstate(invalid="ignore"):
        return np.array(values), (totals[0][0] / totals[0][1], totals[1][0] / totals[1][1])


def _variance(influences: tuple[Floats, Floats], owners: Pair) -> float:
    variance = 0.0
    for influence, owner in zip(influences, owners, strict=True):
        seen = ~np.isnan(influence)
        variance += variance_of_mean(influence[seen], None if owner is None else owner[seen])
    return variance


def _joint_variance(influences: tuple[Floats, Floats], numbers: Numbers) -> float:
    """As `_variance` where the i-th items of both sides belong together: their influences are added up first."""
    total = np.zeros(int(numbers[0].max()) + 1)
    for influence, number in zip(influences, numbers, strict=True):
        seen = ~np.isnan(influence)
        centred = influence[seen] - influence[seen].mean()
        total += np.bincount(number[seen], weights=centred, minlength=len(total)) / seen.sum()
    return float(len(total) / (len(total) - 1) * (total**2).sum())


def _numbers(owners: Pair, x: NDArray[Any], y: NDArray[Any]) -> Numbers:
    """The items of both sides' rows as numbers from 0 up: equal owners have one number on both sides."""
    a, b = (np.arange(len(r)) if owner is None else owner for owner, r in zip(owners, (x, y), strict=True))
    both = np.unique(np.concatenate([a, b]), return_inverse=True)[1].astype(np.int64)
    return both[: len(a)], both[len(a) :]


def _items(*numbers: NDArray[np.int64]) -> str:
    return " and ".join(str(len(np.unique(number))) for number in numbers)


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _check_directions(features: NDArray[Any]) -> None:
    for start, rows in zip(range(0, len(features), BLOCK), blocks(features), strict=True):
        lengths = np.linalg.norm(rows, axis=1)
        if not lengths.all():
            raise ConfigError(
                f"cmmd: the embedding of item {start + int(lengths.argmin())} is all zeros: it has no direction"
            )
