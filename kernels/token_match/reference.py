"""What token matching and merging mean, in plain torch: the specification, the fallback, and the oracle.

`match_argmax`: for each row of `a` its best row of `b`; equal scores go to the lower index. The matrix of scores,
which ToMe writes and reads (3/16 N^2 numbers), never exists whole: rows are taken in slices.

Merging maps every token to a group: a merged token is the mean of its group, unmerging copies it to all members.
Groups are summed member by member in a fixed order, so that results do not depend on the order of atomics.

Source of the method: ToMe (arXiv 2210.09461), ToMe for Stable Diffusion (arXiv 2303.17604).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["METRICS", "Groups", "Metric", "key_terms", "match_reference", "merge_reference", "row_terms"]

Metric = Literal["cosine", "dot", "negative_l2"]
METRICS: tuple[str, ...] = get_args(Metric)
_SLICE_BYTES = 1 << 25
_TINY = 1e-12


@dataclass(frozen=True)
class Groups:
    """Which tokens are merged, ready for any number of merges: made once by `token_groups`, used by every layer.

    `group`: int64 [B, N], the group of each token, 0 to `count` - 1. `order`: int64 [B, N], tokens sorted by group.
    `start`: int64 [B, count + 1], where each group starts in `order`.
    """

    group: Tensor
    order: Tensor
    start: Tensor

    @property
    def count(self) -> int:
        return self.start.shape[1] - 1

    @property
    def size(self) -> Tensor:
        """float32 [B, count], tokens in each group; its log is the `key_logsize` of `sliced_attention`."""
        return self.start.diff(dim=1).float()


def match_reference(a: Tensor, b: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Best score (at least float32) and its index (int64) per row of a [B, N, C] among the rows of b [B, M, C]."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    factor, shift = key_terms(b, metric)
    step = max(1, _SLICE_BYTES // max(1, 4 * len(a) * b.shape[1]))
    best = [_slice(rows, b, factor, shift) for rows in a.split(step, 1)]
    score, index = (torch.cat(parts, 1) for parts in zip(*best, strict=True))
    return row_terms(score, a, metric), index


def _slice(rows: Tensor, b: Tensor, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    scores = (rows @ b.transpose(1, 2)).mul_(factor[:, None]).add_(shift[:, None])
    return scores.amax(-1), scores.argmax(-1)


def key_terms(b: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Per row of b the factor and summand that turn a dot product into a score, up to what depends on a alone."""
    square = _squares(b)
    if metric == "cosine":
        return square.clamp_min(_TINY**2).rsqrt(), torch.zeros_like(square)
    if metric == "dot":
        return torch.ones_like(square), torch.zeros_like(square)
    return torch.full_like(square, 2.0), -square


def row_terms(score: Tensor, a: Tensor, metric: str) -> Tensor:
    """The best score with what depends on the row of a alone: its norm."""
    if metric == "dot":
        return score
    square = _squares(a)
    return score * square.clamp_min(_TINY**2).rsqrt() if metric == "cosine" else score - square


def _squares(x: Tensor) -> Tensor:
    """Squared norms of the rows, in at least float32 without a copy of x in it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    return norms.square()


def merge_reference(x: Tensor, groups: Groups) -> Tensor:
    """[B, count, C], the mean of each group of x [B, N, C], summed in at least float32; an empty group gives zeros."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape[0], groups.count, x.shape[2], dtype=wide, device=x.device)
    total.scatter_add_(1, groups.group[..., None].expand_as(x), x.to(wide))
    return (total / groups.size.clamp_min(1.0)[..., None].to(wide)).to(x.dtype)
