"""Precision and recall of a set of features: how much of it looks real, and how much of the real it covers.

A set's manifold is the union of spheres around its items, each reaching to the item's k-th nearest neighbour of the
same set (Kynkäänniemi, Karras, Laine, Lehtinen, Aila 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.result import Interval, Result
from diffeff.eval.metrics.rows import (
    BLOCK,
    Floats,
    Owners,
    Pair,
    blocks,
    check_pair,
    counts_of,
    items_of,
    owner_numbers,
)
from diffeff.eval.metrics.table import METRICS

__all__ = ["items_inside", "precision_recall", "radii"]

_NOISE = 64 * np.finfo(np.float64).eps


def precision_recall(
    real: NDArray[Any],
    fake: NDArray[Any],
    *,
    k: int = 3,
    block: int = BLOCK,
    features: Mapping[str, Any] | None = None,
    owners: Pair = (None, None),
) -> tuple[Result, Result]:
    """Precision (share of fake items inside the real manifold) and recall (real inside fake), features [N, D].

    Both depend on the numbers of items, so compare at equal numbers only; published figures use 50,000 of each.
    The Wilson intervals are over the items that are tested, with the manifold as it is; where items have several rows
    (`owners` says which item each is of, real first), they count each item once, as if its rows were all alike.
    Time O(N² D); `block` x `block` distances exist at once. Raises ConfigError unless each side
    has at least `k` rows of other items for each item.
    """
    check_pair(real, fake, "precision and recall", owners)
    fewest = min(_others(rows, owner) for rows, owner in zip((real, fake), owners, strict=True))
    if not 1 <= k <= fewest:
        raise ConfigError(
            f"precision and recall: k={k} must be from 1 to {fewest}, the fewest rows of other items that any has"
        )
    sides = _Sides(real, fake, owners, k, features)
    precision = items_inside(fake, real, radii(real, k, owners[0], block), block)
    recall = items_inside(real, fake, radii(fake, k, owners[1], block), block)
    return _result("precision", precision, sides), _result("recall", recall, sides)


def radii(features: NDArray[Any], k: int, owners: Owners | None = None, block: int = BLOCK) -> Floats:
    """Squared distance of each row to its k-th nearest neighbour among the rows of other items, [N].

    Frames of one clip do not count as neighbours of each other: they would shrink every sphere to the clip itself.
    """
    numbers, found = owner_numbers(owners, features), []
    for at, rows in _numbered(features, block):
        nearest = np.full((len(rows), k), np.inf)
        for start, others in _numbered(features, block):
            squares = _squares(rows, others)
            squares[numbers[at : at + block, None] == numbers[None, start : start + block]] = np.inf
            nearest = np.partition(np.hstack([nearest, squares]), k - 1, axis=1)[:, :k]
        found.append(nearest.max(axis=1))
    return np.concatenate(found)


def items_inside(tested: NDArray[Any], centres: NDArray[Any], squared_radii: Floats, block: int = BLOCK) -> int:
    """How many of the tested rows lie in at least one of the spheres (their edge included)."""
    count = 0
    for _, rows in _numbered(tested, block):
        inside = np.zeros(len(rows), dtype=bool)
        for start, others in _numbered(centres, block):
            inside |= (_squares(rows, others) <= squared_radii[start : start + block]).any(axis=1)
        count += int(inside.sum())
    return count


def _numbered(features: NDArray[Any], block: int) -> Iterator[tuple[int, Floats]]:
    return zip(range(0, len(features), block), blocks(features, block), strict=True)


def _others(features: NDArray[Any], owners: Owners | None) -> int:
    """The fewest rows of other items that any row has."""
    return len(features) - int(np.bincount(owner_numbers(owners, features)).max())


def _squares(rows: Floats, others: Floats) -> Floats:
    """Squared distances [n, m]; those within rounding of 0 are 0."""
    sizes = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    squares: Floats = sizes - 2 * rows @ others.T
    # |x|² + |y|² − 2x·y of two equal rows is rounding noise, and would put a copy outside a sphere of radius 0.
    squares[squares <= _NOISE * sizes] = 0.0
    return squares


@dataclass(frozen=True, eq=False)
class _Sides:
    real: NDArray[Any]
    fake: NDArray[Any]
    owners: Pair
    k: int
    features: Mapping[str, Any] | None


def _result(metric: str, inside: int, sides: _Sides) -> Result:
    from diffeff.zoo.score import wilson  # loads torch

    real, fake = sides.real, sides.fake
    items = [items_of(owner, rows) for rows, owner in zip((real, fake), sides.owners, strict=True)]
    tested, trials = (len(fake), items[1]) if metric == "precision" else (len(real), items[0])
    value = inside / tested
    interval = Interval(*wilson(round(value * trials), trials), "Wilson")
    details = counts_of(real, fake) | {"k": sides.k, "inside": inside, "tested": tested}
    notes = () if len(real) == len(fake) else ("the sides differ in number: the larger one's manifold reaches further",)
    return METRICS[metric].result(
        value, items[1], interval=interval, features=sides.features, details=details, notes=notes
    )
