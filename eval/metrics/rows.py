"""Sets of features as rows `[N, D]`: checked, read some at a time, and how sure a number made of them is.

Every distance of two sets has, to first order, one contribution h(x) from each of its rows (its influence function,
Hampel 1974), and the variance of the distance is that of their mean. Rows of one item, such as the frames of a clip,
are alike: their contributions are added up before the variance is taken, so more frames of the same clips do not make
an interval narrower than it should be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.result import Interval

__all__ = [
    "BLOCK",
    "Floats",
    "Owners",
    "Pair",
    "blocks",
    "check_pair",
    "check_rows",
    "counts_of",
    "interval_of",
    "items_of",
    "owner_numbers",
    "variance_of_mean",
    "whole",
]

Floats = NDArray[np.float64]
Owners = NDArray[np.integer[Any]]
"""Which item each row is of, [N]; any numbers, the same for rows of one item."""
Pair = tuple[Owners | None, Owners | None]
"""Owners of the reference's rows and of the subject's; None where each row is an item."""

BLOCK = 1024


def check_rows(features: NDArray[Any], metric: str, least: int = 2) -> None:
    """Raise ConfigError unless this is floating point [N, D] with at least `least` items and 1 dimension."""
    if features.ndim != 2 or features.shape[1] == 0 or not np.issubdtype(features.dtype, np.floating):
        raise ConfigError(
            f"{metric} takes floating-point features [items, dimensions], got {features.dtype} {list(features.shape)}"
        )
    if len(features) < least:
        raise ConfigError(f"{metric} needs at least {least} items on each side, got {len(features)}")


def check_pair(reference: NDArray[Any], subject: NDArray[Any], metric: str, owners: Pair = (None, None)) -> None:
    """Raise ConfigError unless both are sets of features of one dimension, each of at least 2 items."""
    for rows, owner in zip((reference, subject), owners, strict=True):
        check_rows(rows, metric)
        _check_owners(owner, rows, metric)
    if reference.shape[1] != subject.shape[1]:
        raise ConfigError(
            f"{metric}: the reference has features of {reference.shape[1]} dimensions, the subject of "
            f"{subject.shape[1]}: both sides must come from one feature source"
        )


def blocks(features: NDArray[Any], size: int = BLOCK) -> Iterator[Floats]:
    """The rows in float64, `size` at a time. Raises ConfigError at the first item that is not finite."""
    for start in range(0, len(features), size):
        block = np.asarray(features[start : start + size], dtype=np.float64)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise ConfigError(f"the features of item {start + int(finite.argmin())} are not finite: leave it out")
        yield block


def whole(features: NDArray[Any]) -> Floats:
    """All rows at once in float64, checked as `blocks` does."""
    return np.concatenate(list(blocks(features)))


def owner_numbers(owners: Owners | None, features: NDArray[Any]) -> NDArray[np.int64]:
    """The item of each row as a number from 0 up, [N]."""
    if owners is None:
        return np.arange(len(features))
    numbers: NDArray[np.int64] = np.unique(owners, return_inverse=True)[1].astype(np.int64)
    return numbers


def items_of(owners: Owners | None, features: NDArray[Any]) -> int:
    """How many items the rows are of; each is its own without `owners`."""
    return len(features) if owners is None else len(np.unique(owners))


def variance_of_mean(contributions: Floats, owners: Owners | None) -> float:
    """Variance of the mean of these contributions [N] over sets of other items; infinite for fewer than 2 items."""
    centred = contributions - contributions.mean()
    if owners is not None:
        centred = np.bincount(owner_numbers(owners, contributions), weights=centred)
    items = len(centred)
    return float(items / (items - 1) * (centred**2).sum() / len(contributions) ** 2) if items > 1 else math.inf


def interval_of(value: float, variance: float, floor: float = -math.inf) -> Interval:
    """value ± 1.96 standard errors, not below `floor`."""
    half = 1.96 * math.sqrt(variance)
    return Interval(max(floor, value - half), value + half, "± 1.96 standard errors, from each item's influence")


def counts_of(reference: NDArray[Any], subject: NDArray[Any]) -> dict[str, Any]:
    """How many rows of how many dimensions a result was made from."""
    return {"n_reference": len(reference), "n_subject": len(subject), "dim": reference.shape[1]}


def _check_owners(owners: Owners | None, features: NDArray[Any], metric: str) -> None:
    if owners is None:
        return
    if owners.shape != (len(features),):
        raise ConfigError(f"{metric}: {len(features)} rows need one owner each, got {list(owners.shape)}")
    if len(np.unique(owners)) < 2:
        raise ConfigError(f"{metric} needs at least 2 items on each side: all rows are of one")
