"""Fitting the weights of predictors to a plain run: per step and horizon, per group of channels or band, and a small
correction. All in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.extrapolation import Polynomial
from diffeff.methods.caching.fitted import features
from diffeff.methods.caching.grouped import channel_dim, low_pass
from diffeff.methods.caching.published.l2p import L2P
from diffeff.methods.caching.track import Moment, Snapshot
from diffeff.search.trace import Job, Trace, record

__all__ = ["calibrate_l2p"]

Floats = NDArray[np.float64]
View = Callable[[Tensor], Tensor]

_RIDGE = 1e-5
_MIXING_RIDGE = 1e-3
_CHANNEL_GROUPS = 4
_CUTOFF = 0.25


def calibrate_l2p(pipe: Any, job: Job, config: L2P) -> L2P:
    """`config` with its weights (and, with `rank`, its correction) fitted to one plain run of `job`.

    Raises MethodInapplicable for a run without a step to predict.
    """
    trace = record(pipe, job)
    branches = [outputs for outputs in (trace.cond, trace.uncond) if len(outputs) == trace.steps]
    if not branches:
        branches = [trace.predictions]
    gaps = _gaps(config, trace.steps)
    if not gaps:
        raise MethodInapplicable(f"l2p: a run of {trace.steps} steps with these options has no step to predict")
    members = _like_channels(branches[0]) if config.groups == "channels" else ()
    cutoffs = (_CUTOFF,) if config.groups == "bands" else ()
    views = _views(members, cutoffs)
    rows = [[_weights(branches, trace.times, known, k, view, config.depth) for view in views] for k, known in gaps]
    plain = replace(
        config,
        times=tuple(trace.times[k] for k, _ in gaps),
        horizons=tuple(k - known[-1] for k, known in gaps),
        weights=tuple(w for row in rows for group in row for w in group),
        members=members,
        cutoffs=cutoffs,
        out=(),
        into=(),
    )
    return _with_correction(plain, trace, branches, gaps) if config.rank else plain


def _gaps(config: L2P, steps: int) -> list[tuple[int, list[int]]]:
    """Every predicted step with the computed ones it draws on."""
    computed = config.computed(steps)
    return [(k, [c for c in computed if c < k][-config.depth :]) for k in range(steps) if k not in computed]


# --- weights ---------------------------------------------------------------------------------------------------------
def _weights(
    branches: Sequence[Sequence[Tensor]], times: Sequence[float], known: list[int], step: int, view: View, depth: int
) -> tuple[float, ...]:
    """Ridge regression towards a line, over all branches and rows; as many as `depth`, zero where steps are missing."""
    prior = np.array(Polynomial(1).coefficients([times[k] for k in known], times[step]))
    gram = sum((_gram([view(b[k]) for k in (*known, step)]) for b in branches), np.zeros(1))
    missing = gram[:-1, -1] - gram[:-1, :-1] @ prior
    damped = gram[:-1, :-1] + np.diag(_RIDGE * np.diag(gram)[:-1] + np.finfo(np.float64).tiny)
    found = prior + np.linalg.solve(damped, missing)
    return (*(0.0,) * (depth - len(known)), *found.tolist())


def _gram(tensors: Sequence[Tensor]) -> Floats:
    rows = torch.stack([x.detach().flatten().double() for x in tensors]).cpu()
    return np.asarray((rows @ rows.T).numpy(), np.float64)


def _views(members: Sequence[int], cutoffs: Sequence[float]) -> list[View]:
    """What each group sees of a tensor."""
    if members:
        groups = [torch.tensor([c for c, g in enumerate(members) if g == n]) for n in range(max(members) + 1)]
        return [lambda x, g=g: x.index_select(channel_dim(x), g.to(x.device)) for g in groups]  # type: ignore[misc]
    if cutoffs:
        edge = cutoffs[0]
        return [lambda x: low_pass(x.float(), edge), lambda x: x.float() - low_pass(x.float(), edge)]
    return [lambda x: x]


def _like_channels(outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Groups of equal size by how much channels turn: the second difference over the first, summed over the run."""
    channels = torch.stack([x.float().movedim(channel_dim(x), 0).flatten(1) for x in outputs])
    first = channels.diff(dim=0)
    ratio = first.diff(dim=0).abs().sum((0, 2)) / first.abs().sum((0, 2)).clamp_min(1e-12)
    order = ratio.argsort().argsort().tolist()
    count = min(_CHANNEL_GROUPS, len(order))
    return tuple(rank * count // len(order) for rank in order)


# --- the correction --------------------------------------------------------------------------------------------------
def _with_correction(
    config: L2P, trace: Trace, branches: Sequence[Sequence[Tensor]], gaps: Sequence[tuple[int, list[int]]]
) -> L2P:
    """`config` with the matrix of each horizon that best explains what its sums miss."""
    predictor, out, into = config.predictor(), [], []
    for horizon in range(1, config.reach + 1):
        seen, missed = [], []
        for k, known in gaps:
            if k - known[-1] != horizon:
                continue
            for outputs in branches:
                history = [Snapshot(_moment(trace, c), (outputs[c],)) for c in known]
                tensors = [outputs[c] for c in known]
                guess = predictor.fill(history, tensors, _moment(trace, k))  # type: ignore[union-attr]
                seen.append(features(tensors, config.depth))
                missed.append(features([outputs[k].float() - guess.float()], 1))
        u, v = _reduced_rank(torch.cat(seen, 1), torch.cat(missed, 1), config.rank)
        out.append(u)
        into.append(v)
    flat = [tuple(float(x) for m in found for x in m.flatten().tolist()) for found in (out, into)]
    return replace(config, out=flat[0], into=flat[1])


def _moment(trace: Trace, k: int) -> Moment:
    return Moment(k, trace.times[k], k, trace.steps - 1 - k)


def _reduced_rank(seen: Tensor, missed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[channels, rank] and [rank, features] whose product maps `seen` [features, n] to `missed` [channels, n] best
    among such products: ridge regression, cut to the leading directions of what it explains."""
    x, y = seen.double(), missed.double()
    gram = x @ x.T
    ridge = _MIXING_RIDGE * torch.diag(gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny))
    full = torch.linalg.solve(gram + ridge, x @ y.T).T
    leading = torch.linalg.svd(full @ x, full_matrices=False).U[:, :rank]
    padded = torch.zeros(len(y), rank, dtype=x.dtype)
    padded[:, : leading.shape[1]] = leading
    return padded, padded.T @ full
