"""Exact dynamic programming against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from diffeff.errors import ConfigError
from diffeff.search.dynamic import best_paths, best_several, edges, shortest_within

T = 8
ALL = [(0, *rest) for n in range(T) for rest in combinations(range(1, T), n)]


def random_cost(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((T, T, T + 1)) ** 3


@pytest.mark.parametrize("gamma", [1.0, 2.0, 4.0])
def test_the_sum_of_powers_equals_brute_force(gamma: float) -> None:
    for seed in range(100):
        cost = random_cost(seed)
        values = {keys: sum(g**gamma for g in edges(cost, keys)) for keys in ALL}
        for number, path in enumerate(best_paths(cost, gamma=gamma)):
            assert path is not None
            assert len(path.computed) == number + 1
            assert path.value == pytest.approx(min(v for k, v in values.items() if len(k) == number + 1))
            assert path.value == pytest.approx(values[path.computed])


def test_the_several_best_equal_brute_force() -> None:
    for seed in range(20):
        cost = random_cost(seed)
        for computed in (1, 3, 5):
            values = sorted(sum(g**2 for g in edges(cost, keys)) for keys in ALL if len(keys) == computed)
            assert [p.value for p in best_several(cost, computed, 10)] == pytest.approx(values[:10])


def test_lexicographic_minimax_equals_brute_force() -> None:
    for seed in range(100):
        cost = random_cost(seed)
        for number, path in enumerate(best_paths(cost, "minimax")):
            keys = [k for k in ALL if len(k) == number + 1]
            assert path is not None
            assert path.computed == min(keys, key=lambda k: sorted(edges(cost, k), reverse=True))
            assert path.value == max(edges(cost, path.computed))


def test_the_published_recurrence_is_worse() -> None:
    """One predecessor per step, as in DPCache, misses the best schedule of a cost of three steps."""
    missed = 0
    for seed in range(20):
        cost = random_cost(seed)
        exact = best_paths(cost, gamma=1.0)[3]
        assert exact is not None
        value, back = {(0, 0): 0.0}, {(0, 0): 0}
        for m in range(1, 5):
            for k in range(m, T + 1):
                options = {j: value[m - 1, j] + cost[back[m - 1, j], j, k] for j in range(k) if (m - 1, j) in value}
                if options and (k < T or m == 4):
                    back[m, k] = min(options, key=lambda j: options[j])
                    value[m, k] = options[back[m, k]]
        assert value[4, T] >= exact.value - 1e-12
        missed += value[4, T] > exact.value + 1e-12
    assert missed >= 5


def test_an_error_budget_takes_the_fewest_steps() -> None:
    paths = best_paths(random_cost(0))
    errors = [p.error for p in paths if p is not None]
    for budget in (0.05, 0.2, 0.5, 10.0):
        found = shortest_within(paths, budget)
        wanted = next((n + 1 for n, e in enumerate(errors) if e <= budget), None)
        assert (None if found is None else len(found.computed)) == wanted


def test_ruled_out_gaps_are_avoided_and_impossible_ones_told() -> None:
    cost = np.full((3, 3, 4), np.inf)
    cost[0, 0, 1] = cost[0, 1, 2] = cost[1, 2, 3] = 0.0
    paths = best_paths(cost)
    assert paths[0] is None
    assert paths[1] is None
    assert paths[2] is not None
    assert paths[2].computed == (0, 1, 2)
    assert best_paths(cost, "minimax")[:2] == [None, None]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected"):
        best_paths(np.zeros((3, 3, 3)))
    with pytest.raises(ConfigError, match="gamma"):
        best_paths(np.zeros((3, 3, 4)), gamma=0)
