"""The weights of a schedule adjusted together on what counts, the final latents: Gauss-Newton, without gradients.

All that the predictions of one gap do to the run is to add multiples of what they are made of: so a gap has as many
free values as its predictions have terms, however many steps it skips. Each value is moved once per round, with all
that was computed before it taken from memory; a round costs about one plain run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffeff.methods.caching.scheduled import FITTED
from diffeff.search.closed_loop import EndError
from diffeff.search.schedule import Schedule

__all__ = ["refit"]

log = logging.getLogger("diffeff")

_STEP = 1e-3
_DAMPINGS = (1e-5, 1e-3, 1e-1)
_WORTH = 0.97


@dataclass(frozen=True)
class _Value:
    """One adjustable number: a term of all fitted steps of a gap, or of one estimated guidance difference."""

    field: str
    places: tuple[int, ...]
    """Entries of the field that share it."""
    term: int


def refit(
    schedule: Schedule,
    evaluate: EndError,
    rounds: int = 3,
    *,
    observe: Callable[[float], None] = lambda done: None,
) -> tuple[Schedule, float]:
    """The schedule with its fitted weights adjusted to where the plain run ends, and its true error.

    Steps filled by a named predictor are left as they are. Ends early when a round gains little.
    """
    values = list(_values(schedule))
    best, error = schedule, evaluate(schedule)
    evaluate.keep(schedule)
    for number in range(rounds if values else 0):
        tell = lambda done, n=number: observe((n + done) / rounds)  # noqa: E731
        again, found = _round(best, error, values, evaluate, tell)
        gained = found < _WORTH * error
        best, error = again, found
        if not gained:
            break
    log.debug("refit: error %.5f", error)
    return best, error


def _values(schedule: Schedule) -> Iterator[_Value]:
    gaps: dict[int, list[int]] = {}
    number, last = 0, 0
    names = iter(schedule.predictors)
    for k, action in enumerate(schedule.actions):
        if action != "none":
            last = k
        elif next(names, "") == FITTED:
            gaps.setdefault(last, []).append(number)
            number += 1
    for places in gaps.values():
        for term in range(len(schedule.weights[places[0]])):
            yield _Value("weights", tuple(places), term)
    for place, weights in enumerate(schedule.deltas):
        for term in range(len(weights)):
            yield _Value("deltas", (place,), term)


def _moved(schedule: Schedule, values: Sequence[_Value], change: Sequence[float]) -> Schedule:
    parts = {name: [list(w) for w in getattr(schedule, name)] for name in ("weights", "deltas")}
    for value, delta in zip(values, change, strict=True):
        for place in value.places:
            parts[value.field][place][value.term] += delta
    weights, deltas = (tuple(tuple(w) for w in parts[name]) for name in ("weights", "deltas"))
    return replace(schedule, weights=weights, deltas=deltas)


def _round(
    schedule: Schedule,
    error: float,
    values: Sequence[_Value],
    evaluate: EndError,
    observe: Callable[[float], None],
) -> tuple[Schedule, float]:
    """Derivatives by finite differences, then the first damped step that helps."""
    start, columns = evaluate.base_residual, []
    for number, value in enumerate(values):
        evaluate(_moved(schedule, [value], [_STEP]))
        columns.append((evaluate.residual - start) / _STEP)
        observe((number + 1) / (len(values) + 1))
    jacobian = torch.stack(columns, dim=1)
    normal, slope = jacobian.T @ jacobian, jacobian.T @ start
    for damping in _DAMPINGS:
        change = torch.linalg.solve(normal + damping * _diagonal(normal), -slope).tolist()
        again = _moved(schedule, values, change)
        found = evaluate(again)
        if math.isfinite(found) and found < error:
            evaluate.keep(again)
            return again, found
    return schedule, error


def _diagonal(normal: Tensor) -> Tensor:
    diagonal = normal.diagonal()
    return torch.diag(diagonal + 1e-12 * diagonal.max().clamp_min(1e-30))
