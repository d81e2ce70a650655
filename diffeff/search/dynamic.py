"""The cheapest schedule by exact dynamic programming, for costs that depend on three computed steps in a row.

State (j, k): j is computed, k the next computed one. The published recurrence (DPCache) keeps one predecessor per
step, which is not exact for such costs; this one is.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError

__all__ = ["Objective", "Path", "best_paths", "best_several", "edges", "shortest_within"]

Floats = NDArray[np.float64]
Objective = Literal["power", "minimax"]


@dataclass(frozen=True)
class Path:
    """Computed steps in order, the cost of each gap that follows one of them, and what was minimised."""

    computed: tuple[int, ...]
    gaps: tuple[float, ...]
    objective: Objective
    gamma: float

    @property
    def value(self) -> float:
        """sum of gaps ** gamma, or the largest gap."""
        return max(self.gaps) if self.objective == "minimax" else sum(g**self.gamma for g in self.gaps)

    @property
    def error(self) -> float:
        """Root of the sum of the gaps' squares: the error of a run whose gaps err independently."""
        return float(np.sqrt(np.sum(np.square(self.gaps))))


def best_paths(cost: Floats, objective: Objective = "power", gamma: float = 2.0) -> list[Path | None]:
    """The best schedule for every number of computed steps, entry n for n + 1 of them; None where all are ruled out.

    `cost[i, j, k]` as in `Costs.error`: [T, T, T + 1], step 0 always computed. `power` minimises the sum of
    cost ** gamma; `minimax` the largest cost, then the second largest, and so on (LeMiCa).
    Raises ConfigError for another shape and for gamma <= 0.
    """
    steps = cost.shape[0]
    if cost.ndim != 3 or cost.shape != (steps, steps, steps + 1):
        raise ConfigError(f"costs have the shape {cost.shape}; expected [T, T, T + 1]")
    if not gamma > 0:
        raise ConfigError(f"gamma is {gamma}; it must be above 0")
    found = _minimax(cost) if objective == "minimax" else _power(cost**gamma)
    return [None if keys is None else Path(keys, edges(cost, keys), objective, gamma) for keys in found]


def best_several(cost: Floats, computed: int, most: int, gamma: float = 2.0) -> list[Path]:
    """The `most` best schedules of so many computed steps by the sum of cost ** gamma, the best first.

    What recorded runs rank close together, real runs may rank otherwise: these are worth a try each.
    """
    steps, powered = cost.shape[0], cost**gamma
    State = dict[tuple[int, int], list[tuple[float, tuple[int, ...]]]]
    states: State = {(0, k): [(float(powered[0, 0, k]), (0,))] for k in range(1, steps + 1)}
    for _ in range(1, computed):
        moved: State = {}
        for (j, k), held in states.items():
            for end in range(k + 1, steps + 1) if k < steps else ():
                longer = [(value + float(powered[j, k, end]), (*keys, k)) for value, keys in held]
                moved.setdefault((k, end), []).extend(longer)
        states = {state: nsmallest(most, found) for state, found in moved.items()}
    ends = [entry for (_, k), held in states.items() if k == steps for entry in held if np.isfinite(entry[0])]
    return [Path(keys, edges(cost, keys), "power", gamma) for _, keys in nsmallest(most, ends)]


def edges(cost: Floats, computed: Sequence[int]) -> tuple[float, ...]:
    """The cost of each gap of a schedule."""
    before = [computed[0], *computed[:-1]]
    after = [*computed[1:], cost.shape[0]]
    return tuple(float(cost[i, j, k]) for i, j, k in zip(before, computed, after, strict=True))


def shortest_within(paths: Sequence[Path | None], error: float) -> Path | None:
    """The schedule of fewest computed steps whose error stays within `error`; None where none does."""
    return next((path for path in paths if path is not None and path.error <= error), None)


def _power(cost: Floats) -> list[tuple[int, ...] | None]:
    steps = cost.shape[0]
    value = np.full((steps, steps + 1), np.inf)
    value[0] = cost[0, 0]
    backs: list[NDArray[np.int64]] = []
    found = [_traced(value, backs)]
    for _ in range(1, steps):
        # value[j, k] + cost[j, k, l], minimised over j, becomes value[k, l]
        moved = value[:, :steps, None] + np.where(np.tri(steps, k=-1, dtype=bool).T[:, :, None], cost, np.inf)
        backs.append(moved.argmin(axis=0))
        value = moved.min(axis=0)
        found.append(_traced(value, backs))
    return found


def _traced(value: Floats, backs: Sequence[NDArray[np.int64]]) -> tuple[int, ...] | None:
    j, k = int(value[:, -1].argmin()), value.shape[1] - 1
    if not np.isfinite(value[j, k]):
        return None
    keys = [j]
    for back in reversed(backs):
        j, k = int(back[j, k]), j
        keys.append(j)
    return tuple(reversed(keys))


def _minimax(cost: Floats) -> list[tuple[int, ...] | None]:
    """Sorted lists of gaps compare as a lexicographic order that adding a gap to both sides keeps, so that dynamic
    programming over them is exact, too."""
    steps = cost.shape[0]
    State = dict[tuple[int, int], tuple[list[float], tuple[int, ...]]]
    states: State = {(0, k): ([-cost[0, 0, k]], (0,)) for k in range(1, steps + 1)}
    found = [_finished(states, steps)]
    for _ in range(1, steps):
        moved: State = {}
        for (j, k), (gaps, keys) in states.items():
            if k == steps:
                continue
            for end in range(k + 1, steps + 1):
                longer = gaps.copy()
                insort(longer, -cost[j, k, end])  # negative: the largest gap comes first, and the list stays sorted
                held = moved.get((k, end))
                if held is None or longer > held[0]:
                    moved[k, end] = longer, (*keys, k)
        states = moved
        found.append(_finished(states, steps))
    return found


def _finished(states: dict[tuple[int, int], tuple[list[float], tuple[int, ...]]], steps: int) -> tuple[int, ...] | None:
    ends = [state for (_, k), state in states.items() if k == steps and np.isfinite(state[0][0])]
    return max(ends, key=lambda state: state[0])[1] if ends else None
