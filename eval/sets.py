"""Set metrics of an evaluation: all items against all reference items, over rows of features.

A clip has several rows, one a frame. Frames of one clip are alike, and so are an item and its partner that started
from the same noise: the metrics are told which rows belong together, or they would take them for independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffeff.eval.entries import Entry, content
from diffeff.eval.measurement import store_of
from diffeff.eval.metrics.frechet import frechet
from diffeff.eval.metrics.kernel import cmmd, kid
from diffeff.eval.metrics.manifold import precision_recall
from diffeff.eval.metrics.result import Result
from diffeff.eval.probing import Features
from diffeff.eval.statistics import Statistics

if TYPE_CHECKING:
    from diffeff.eval.store import WorkFolder

__all__ = ["RowSets", "counts_of", "gather", "set_result"]

Rows = NDArray[np.float32]

_PAIRED: Mapping[str, str] = dict.fromkeys(("fid", "fvd", "cmmd"), "smaller") | dict.fromkeys(
    ("precision", "recall"), "higher"
)
"""What it does to a metric when each item has its partner in the reference. KID leaves the partners out."""


@dataclass(frozen=True, eq=False)
class RowSets:
    """The rows `[N, D]` of both sides with the item each row is of; `paired` when the i-th items belong together."""

    reference: Rows
    subject: Rows
    owners: tuple[NDArray[np.int64], NDArray[np.int64]]
    paired: bool
    facts: Mapping[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """What every metric is told."""
        return {"features": self.facts, "owners": self.owners}


def gather(
    features: Features,
    subject: Sequence[Entry],
    partners: Sequence[Entry] | None,
    reference: Sequence[Entry] | Statistics,
    work: WorkFolder,
) -> RowSets:
    """The rows of both sides, as memory maps. Raises ConfigError for statistics of other features."""
    mine = store_of(features, work).gather([entry.sha256 for entry in subject])
    if isinstance(reference, Statistics):
        theirs, counts = reference.of(features.name, features.facts), reference.counts[features.name]
        same = partners is not None and content(partners)["sha256"] == reference.content
    else:
        theirs = store_of(features, work).gather([entry.sha256 for entry in reference])
        counts = counts_of(features, reference, work)
        same = partners is not None and [p.sha256 for p in partners] == [r.sha256 for r in reference]
    owners = _owners(counts), _owners(counts_of(features, subject, work))
    return RowSets(theirs, mine, owners, same, features.ability.facts)


def counts_of(features: Features, entries: Sequence[Entry], work: WorkFolder) -> list[int]:
    """How many rows each item has."""
    store = store_of(features, work)
    return [store.count(entry.sha256) for entry in entries]


def set_result(metric: str, sets: RowSets, seed: int) -> Result:
    """One set metric. Its `n` are items, `details` say how many rows they have."""
    result = _METRICS[metric](sets, seed)
    if not sets.paired or metric not in _PAIRED:
        return result
    note = f"each item has its partner in the reference, so the value is {_PAIRED[metric]} than for independent sets"
    return replace(result, notes=(*result.notes, note))


def _owners(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


_METRICS: Mapping[str, Callable[[RowSets, int], Result]] = {
    "fid": lambda sets, seed: frechet(sets.reference, sets.subject, metric="fid", **sets.given),
    "fvd": lambda sets, seed: frechet(sets.reference, sets.subject, metric="fvd", **sets.given),
    "kid": lambda sets, seed: kid(sets.reference, sets.subject, seed=seed, paired=sets.paired, **sets.given),
    "cmmd": lambda sets, seed: cmmd(sets.reference, sets.subject, **sets.given),
    "precision": lambda sets, seed: precision_recall(sets.reference, sets.subject, **sets.given)[0],
    "recall": lambda sets, seed: precision_recall(sets.reference, sets.subject, **sets.given)[1],
}
