"""`match_argmax`, `merge_scatter`, `unmerge`: kernel or reference, registered for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from diffeff.kernels.targets import pick, runs_triton
from diffeff.kernels.token_match.reference import METRICS, Groups, Metric, match_reference, merge_reference

__all__ = ["match_argmax", "merge_scatter", "token_groups", "unmerge"]


def match_argmax(a: Tensor, b: Tensor, *, metric: Metric = "cosine", kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """The most similar row of `b` for each row of `a`, without the matrix of similarities in memory.

    `a`: [B, N, C], `b`: [B, M, C]. `metric`: cosine, dot, or negative_l2 (minus the squared distance). Returns scores
    [B, N] in at least float32 and indices [B, N] int64; of equal scores the lowest index wins. NaN never wins.

    Rule of kernel="auto": Triton on CUDA, the reference (slices of rows) elsewhere. Raises ValueError for shapes that
    do not fit and for an unknown metric.
    """
    if not (a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[2] and b.shape[1]):
        raise ValueError(f"match_argmax takes [B, N, C] and [B, M, C], not {tuple(a.shape)} and {tuple(b.shape)}")
    if metric not in METRICS:
        raise ValueError(f"match_argmax has no metric {metric!r}; known: {', '.join(METRICS)}")
    result: tuple[Tensor, Tensor] = _match(a, b, metric, _chosen("match_argmax", kernel, a))
    return result


def token_groups(group: Tensor, count: int) -> Groups:
    """Groups of tokens, sorted once for all merges: `group` int64 [B, N] with values 0 to `count` - 1."""
    order = group.argsort(dim=1, stable=True)
    ends = torch.arange(count + 1, device=group.device).expand(len(group), -1).contiguous()
    start = torch.searchsorted(group.gather(1, order), ends)
    return Groups(group, order, start)


def merge_scatter(x: Tensor, groups: Groups, *, kernel: str = "auto") -> Tensor:
    """Fewer tokens: the mean of each group of x [B, N, C], as [B, count, C]. Sums in float32, the same bits each time.

    Rule of kernel="auto": Triton on CUDA, the reference elsewhere. An empty group gives zeros. Forward only.
    """
    if x.ndim != 3 or x.shape[:2] != groups.group.shape:
        raise ValueError(f"merge_scatter: tokens {tuple(x.shape)} do not match groups {tuple(groups.group.shape)}")
    kind = _chosen("merge_scatter", kernel, x)
    result: Tensor = _merge(x, groups.group, groups.order, groups.start, kind)
    return result


def unmerge(y: Tensor, groups: Groups) -> Tensor:
    """Every token again: [B, N, C] with the row of its group from y [B, count, C].

    Plain indexing on every device: torch's gather of rows already is one pass at memory speed.
    """
    if y.ndim != 3 or y.shape[:2] != (len(groups.group), groups.count):
        raise ValueError(f"unmerge: {tuple(y.shape)} does not match {groups.count} groups")
    return y.gather(1, groups.group[..., None].expand(-1, -1, y.shape[2]))


def _chosen(op: str, kernel: str, x: Tensor) -> bool:
    """Whether a call gets the Triton kernel."""
    pays = x.is_cuda and runs_triton(x.device) and x.dtype is not torch.float64
    chosen = pick(op, kernel, x.device, "triton" if pays else "reference")
    if chosen == "sdpa":
        raise ValueError(f"{op} has no kernel 'sdpa'; known: auto, triton, reference")
    return chosen == "triton"


@torch.library.custom_op(
    "diffeff::match_argmax",
    mutates_args=(),
    schema="(Tensor a, Tensor b, str metric, bool triton) -> (Tensor, Tensor)",
)
def _match(a: Tensor, b: Tensor, metric: str, triton: bool) -> tuple[Tensor, Tensor]:
    if triton:
        from diffeff.kernels.token_match.triton import match_triton

        return match_triton(a, b, metric)
    return match_reference(a, b, metric)


@_match.register_fake
def _(a: Tensor, b: Tensor, metric: str, triton: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(a.shape[:2], dtype=wide), a.new_empty(a.shape[:2], dtype=torch.int64)


@torch.library.custom_op(
    "diffeff::merge_scatter",
    mutates_args=(),
    schema="(Tensor x, Tensor group, Tensor order, Tensor start, bool triton) -> Tensor",
)
def _merge(x: Tensor, group: Tensor, order: Tensor, start: Tensor, triton: bool) -> Tensor:
    groups = Groups(group, order, start)
    if triton:
        from diffeff.kernels.token_match.triton import merge_triton

        return merge_triton(x, groups)
    return merge_reference(x, groups)


@_merge.register_fake
def _(x: Tensor, group: Tensor, order: Tensor, start: Tensor, triton: bool) -> Tensor:
    return x.new_empty(x.shape[0], start.shape[1] - 1, x.shape[2])
