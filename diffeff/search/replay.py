"""Every predictor tried on a recorded run without calling the model: what each possible gap would cost.

All predictors are weighted sums of recorded tensors, so the error of each is a quadratic form in the tensors' inner
products. These are computed once; after that no tensor is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffeff.errors import ConfigError
from diffeff.methods.caching.predictor import PREDICTORS
from diffeff.methods.caching.scheduled import FITTED

__all__ = ["CANDIDATES", "GAPS", "Costs", "Replay", "costs", "exact"]

Floats = NDArray[np.float64]

CANDIDATES = (FITTED, "linear", "hold", "damped", "quadratic", "cubic", "taylor", "hermite", "chebyshev")
"""What a skipped step may be filled with, in order of preference."""

GAPS = (FITTED, "linear", "hold", "damped")
"""Those of two snapshots at most: all that a table over three computed steps can tell apart."""

_RIDGE = 1e-5
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Replay:
    """Inner products of one or more recorded runs of the same steps.

    `gram` is [runs, 2 T, 2 T]: first the T tensors to be predicted, then the T present ones that may take part in it
    (latents before each step, or conditional predictions where guidance differences are predicted). `size` is the
    squared length of what errors are counted against, per run.
    """

    times: tuple[float, ...]
    gram: Floats
    size: Floats

    @classmethod
    def of(cls, targets: Sequence[Tensor], present: Sequence[Tensor], final: Tensor, times: Sequence[float]) -> Replay:
        """From tensors by step, each [runs, ...]. Present tensors of another shape take no part (all zero)."""
        if targets[0].shape != present[0].shape:
            present = [torch.zeros_like(x) for x in targets]
        runs, both = targets[0].shape[0], [*targets, *present]
        grams = [_gram([x[run] for x in both]) for run in range(runs)]
        size = final.detach().double().flatten(1).square().sum(1).cpu().numpy()
        return cls(tuple(times), np.stack(grams), size)

    @property
    def steps(self) -> int:
        return len(self.times)

    @cached_property
    def total(self) -> Floats:
        """Inner products over all runs, each counted against its own size: what weights are fitted to."""
        return np.asarray(np.einsum("r,rij->ij", 1 / self.size, self.gram) / len(self.size), np.float64)

    def taken(self, steps: Sequence[int]) -> Replay:
        """Only these steps."""
        rows = np.array([*steps, *(self.steps + s for s in steps)])
        return Replay(tuple(self.times[s] for s in steps), self.gram[:, rows[:, None], rows], self.size)

    # --- one prediction -----------------------------------------------------------------------------------------
    def weights(self, name: str, known: Sequence[int], step: int) -> tuple[float, ...]:
        """Weights of a prediction at `step`: of the present tensor, then of the steps `known`, oldest first."""
        if name == FITTED:
            return self._fitted(known, step)
        predictor = PREDICTORS[name]
        axis = self.times if predictor.axis == "time" else tuple(float(k) for k in range(self.steps))
        used = list(known)[-predictor.snapshots :]
        found = predictor.coefficients([axis[k] for k in used], axis[step])
        return (0.0, *(0.0,) * (len(known) - len(used)), *found)

    def _fitted(self, known: Sequence[int], step: int) -> tuple[float, ...]:
        """Ridge regression towards the linear prediction: what the recorded run does not determine stays linear."""
        prior = np.array(self.weights("linear" if len(known) > 1 else "hold", known, step))
        rows = np.array([self.steps + step, *known])
        gram = self.total[np.ix_(rows, rows)]
        missing = self.total[rows, step] - gram @ prior
        scale = np.diag(gram).copy()
        damped = gram + np.diag(_RIDGE * scale + np.finfo(np.float64).tiny)
        return tuple((prior + np.linalg.solve(damped, missing)).tolist())

    def deviation(self, name: str, known: Sequence[int], step: int) -> Floats:
        """The prediction's error at `step` as weights of all recorded tensors, [2 T]."""
        weights = self.weights(name, known, step)
        found = np.zeros(2 * self.steps)
        found[step] = 1.0
        found[self.steps + step] -= weights[0]
        found[list(known)] -= weights[1:]
        return found

    def length(self, deviations: Floats) -> Floats:
        """Root mean square length over runs, each relative to its size, of errors [..., 2 T]."""
        squares = np.einsum("...i,ij,...j->...", deviations, self.total, deviations)
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)), np.float64)


def _gram(tensors: Sequence[Tensor]) -> Floats:
    """Inner products in float64, a block of elements at a time."""
    flat = [x.detach().flatten() for x in tensors]
    total = np.zeros((len(flat), len(flat)))
    for start in range(0, flat[0].numel(), _BLOCK):
        rows = torch.stack([x[start : start + _BLOCK].double() for x in flat]).cpu()
        total += (rows @ rows.T).numpy()
    return total


# --- tables ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Costs:
    """What each gap costs: `error[i, j, k]` for computing i, then j, then k, and predicting all between j and k.

    [T, T, T + 1]; `error[j, j, k]` knows j alone (the first step of a run), k = T is the end of the run. `best` is the
    number in `names` of the predictor that makes the gap cheapest.
    """

    names: tuple[str, ...]
    error: Floats
    best: NDArray[np.int64]

    def named(self, i: int, j: int, k: int) -> str:
        return self.names[int(self.best[i, j, k])]


def costs(replay: Replay, sensitivity: Floats, names: Sequence[str] = GAPS, longest: int = 0) -> Costs:
    """Error tables C_p[i, j, k] of the predictors `names`, reduced to the best one of each gap.

    `sensitivity[k]` is how much the end of the run moves per unit of error at step k. Errors of one gap point the same
    way more often than not, so their weighted sum counts as a vector, not as lengths. Gaps longer than `longest`
    skipped steps (0: no limit) are ruled out (infinite). Predictors that could use older steps get the two here.
    """
    if len(sensitivity) != replay.steps:
        raise ConfigError(f"there are {len(sensitivity)} sensitivities for {replay.steps} steps")
    tables = np.stack([_table(replay, sensitivity, name, longest) for name in names])
    best = tables.argmin(axis=0)
    return Costs(tuple(names), np.take_along_axis(tables, best[None], axis=0)[0], best)


def _table(replay: Replay, sensitivity: Floats, name: str, longest: int) -> Floats:
    steps = replay.steps
    found = np.full((steps, steps, steps + 1), np.inf)
    for j in range(steps):
        for i in range(j + 1):
            known = [j] if i == j else [i, j]
            stop = steps if not longest else min(steps, j + 1 + longest)
            found[i, j, j + 1] = 0.0
            if stop > j + 1:
                gaps = np.stack([sensitivity[k] * replay.deviation(name, known, k) for k in range(j + 1, stop)])
                found[i, j, j + 2 : stop + 1] = replay.length(np.cumsum(gaps, axis=0))
    return found


def exact(
    replay: Replay, sensitivity: Floats, computed: Sequence[int], depth: int, names: Sequence[str] = CANDIDATES
) -> Mapping[int, tuple[str, float]]:
    """For every gap of a known schedule, by its first computed step: the best predictor, and the gap's error.

    Here predictors use all the computed steps they can, up to `depth` for fitted ones.
    """
    ends = [*computed[1:], replay.steps]
    found = {}
    for number, (start, stop) in enumerate(zip(computed, ends, strict=True)):
        if stop == start + 1:
            continue
        known = list(computed[: number + 1])
        errors = {}
        for name in names:
            used = known[-depth:] if name == FITTED else known
            gap = np.sum([sensitivity[k] * replay.deviation(name, used, k) for k in range(start + 1, stop)], axis=0)
            errors[name] = float(replay.length(gap))
        best = min(errors, key=lambda name: errors[name])
        found[start] = best, errors[best]
    return found
