"""Predictors whose weights were fitted to recorded runs: a row per step and horizon, for all or for parts of a
tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from diffeff.methods.caching.extrapolation import Polynomial
from diffeff.methods.caching.grouped import banded_sum, channel_dim, channel_sum, weights_of
from diffeff.methods.caching.predictor import Grouped, combine

if TYPE_CHECKING:
    from diffeff.methods.caching.track import Moment, Snapshot

__all__ = ["Corrected", "Correction", "Fitted", "FittedRow", "Mixing", "features"]

Weights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FittedRow:
    """Weights at one step of the recorded runs: `weights[group][snapshot]`, oldest first, predicted `horizon` steps
    behind the newest snapshot at the run's own `time`."""

    time: float
    horizon: int
    weights: Weights


@dataclass(frozen=True)
class Fitted:
    """The row of the same horizon that is nearest in time; a line where there is none, or where it needs older
    snapshots than there are.

    `members` names the group of each channel, `cutoffs` (rising) the bands; with neither there is one group.

    Source: L2P (arXiv 2604.26365); groups of channels after HyCa (arXiv 2510.04188).
    """

    rows: tuple[FittedRow, ...]
    depth: int
    members: tuple[int, ...] = ()
    cutoffs: tuple[float, ...] = ()

    @property
    def snapshots(self) -> int:
        return max(self.depth, 2)

    def row(self, time: float, horizon: int, known: int) -> FittedRow | None:
        """The one that serves at a step of this time and horizon with so many snapshots."""
        fit = [r for r in self.rows if r.horizon == horizon and not any(any(w[:-known]) for w in r.weights)]
        return min(fit, key=lambda r: abs(r.time - time), default=None)

    def fill(self, history: Sequence[Snapshot], tensors: Sequence[Tensor], at: Moment) -> Tensor:
        row = self.row(at.time, at.index - history[-1].moment.index, len(history))
        if row is None:
            return combine(tensors, weights_of(Polynomial(1), history, at))
        known = min(len(tensors), self.depth)
        used, weights = tensors[-known:], [w[-known:] for w in row.weights]
        if self.members:
            return channel_sum(used, weights, self.members)
        return banded_sum(used, weights, self.cutoffs) if self.cutoffs else combine(used, weights[0])


class Correction(Protocol):
    """A small trained module that improves a prediction."""

    def __call__(self, tensors: Sequence[Tensor], guess: Tensor, horizon: int) -> Tensor:
        """What to add to `guess` (float32), from the snapshots it was made of; `horizon` steps behind the newest."""


@dataclass(frozen=True)
class Corrected:
    """A predictor and a trained module that corrects it."""

    inner: Grouped
    correction: Correction

    @property
    def snapshots(self) -> int:
        return self.inner.snapshots

    def fill(self, history: Sequence[Snapshot], tensors: Sequence[Tensor], at: Moment) -> Tensor:
        guess = self.inner.fill(history, tensors, at)
        more = self.correction(tensors, guess, at.index - history[-1].moment.index)
        return (guess.to(more.dtype) + more).to(guess.dtype)


def features(tensors: Sequence[Tensor], depth: int) -> Tensor:
    """What a mixing sees of each pixel or token [depth * channels, positions]: the newest of the snapshots, then its
    move since the last one, and that one's; zero for snapshots that are not there. float32 at least."""
    last = tensors[-1]
    wide = torch.promote_types(last.dtype, torch.float32)
    moves = [b.to(wide) - a.to(wide) for a, b in pairwise(tensors)][::-1][: depth - 1]
    pieces = [last.to(wide), *moves, *([torch.zeros_like(last, dtype=wide)] * (depth - 1 - len(moves)))]
    return torch.cat([x.movedim(channel_dim(x), 0).flatten(1) for x in pieces])


@dataclass(frozen=True)
class Mixing:
    """Mixes channels: at every pixel or token, a matrix of low rank maps what the snapshots show there to what a
    weighted sum missed. `out[h - 1]` is [channels, rank] and `into[h - 1]` [rank, depth * channels] for horizon h;
    beyond the last fitted horizon nothing is added."""

    out: tuple[Weights, ...]
    into: tuple[Weights, ...]
    depth: int

    def __call__(self, tensors: Sequence[Tensor], guess: Tensor, horizon: int) -> Tensor:
        seen = features(tensors, self.depth)
        if horizon > len(self.out):
            return torch.zeros_like(guess, dtype=seen.dtype)
        out, into = (seen.new_tensor(table[horizon - 1]) for table in (self.out, self.into))
        dim = channel_dim(guess)
        moved = guess.movedim(dim, 0)
        return (out @ (into @ seen)).reshape(moved.shape).movedim(0, dim)
