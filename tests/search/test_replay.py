"""Replayed errors are those of tensors; schedules found in them reach the exhaustive best on a small DiT."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from types import MappingProxyType

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffeff.errors import ConfigError
from diffeff.methods.caching.predictor import PREDICTORS, combine
from diffeff.search.closed_loop import local_swaps, neighbours
from diffeff.search.replay import CANDIDATES, FITTED, Replay, costs, exact
from diffeff.search.schedule import Schedule
from diffeff.search.schedules import ScheduleSearch

T = 9
TIMES = tuple(1.0 - k / T for k in range(T))


def recorded(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, 2, 4, 5, generator=draw)
    targets = [parts[0] + t * parts[1] + t**3 * parts[2] for t in TIMES]
    present = [torch.randn(2, 4, 5, generator=draw) for _ in TIMES]
    return targets, present, torch.randn(2, 4, 5, generator=draw)


@pytest.mark.parametrize("name", [n for n in CANDIDATES if n != FITTED])
def test_replayed_errors_are_those_of_tensors(name: str) -> None:
    targets, present, final = recorded()
    replay, predictor = Replay.of(targets, present, final, TIMES), PREDICTORS[name]
    known, step = [0, 2, 3], 6
    used = known[-predictor.snapshots :]
    axis = TIMES if predictor.axis == "time" else tuple(float(k) for k in range(T))
    guess = combine([targets[k] for k in used], predictor.coefficients([axis[k] for k in used], axis[step]))
    gap = (targets[step] - guess).double().flatten(1).square().sum(1) / final.double().flatten(1).square().sum(1)
    assert float(replay.length(replay.deviation(name, known, step))) == pytest.approx(
        float(gap.mean().sqrt()), rel=1e-4
    )


def test_the_line_is_exact_on_lines_and_fitted_weights_are_never_worse() -> None:
    targets, present, final = recorded()
    line = [targets[0] + t * targets[1] for t in TIMES]
    replay = Replay.of(line, present, final, TIMES)
    assert float(replay.length(replay.deviation("linear", [0, 3], 7))) < 1e-5
    curved = Replay.of(targets, present, final, TIMES)
    for known in ([2], [0, 2], [0, 1, 2]):
        errors = {n: float(curved.length(curved.deviation(n, known, 5))) for n in (FITTED, "linear", "hold")}
        assert errors[FITTED] <= min(errors.values()) * 1.01


def test_tables_hold_the_error_of_each_gap() -> None:
    targets, present, final = recorded()
    replay, weight = Replay.of(targets, present, final, TIMES), np.linspace(1, 2, T)
    table = costs(replay, weight, ("hold", "linear"), longest=3)
    assert table.error[0, 1, 2] == 0
    assert np.isinf(table.error[0, 1, 6])
    assert np.isfinite(table.error[0, 1, 5])
    moved = sum(weight[k] * (targets[k] - targets[4]) for k in (5, 6)).double().flatten(1).square().sum(1)
    held = float((moved / torch.from_numpy(replay.size)).mean().sqrt())
    assert table.error[4, 4, 7] == pytest.approx(held, rel=1e-4)
    assert table.error[2, 4, 7] <= held * (1 + 1e-9)
    gaps = exact(replay, weight, [0, 2, 4], 3, ("hold",))
    assert gaps[0][1] == pytest.approx(costs(replay, weight, ("hold",)).error[0, 0, 2])
    with pytest.raises(ConfigError, match="sensitivities"):
        costs(replay, weight[:-1])


def test_a_trajectory_of_other_shape_than_the_prediction_takes_no_part() -> None:
    targets, _, final = recorded()
    replay = Replay.of(targets, [torch.randn(2, 7) for _ in TIMES], final, TIMES)
    assert not replay.gram[:, T:].any()
    assert replay.weights(FITTED, [0, 2], 4)[0] == 0


# --- the gap to the oracle -------------------------------------------------------------------------------------------
STEPS = 12


class World:
    """A DiT of random weights sampled by Euler; every row of a batch follows a schedule of its own."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = diffusers.DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=2, sample_size=4, patch_size=2,
                num_embeds_ada_norm=10, norm_num_groups=2, out_channels=2,
            ).eval()  # fmt: skip
            for p in self.model.parameters():
                torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else None
            self.noise = torch.randn(1, 2, 4, 4)
        self.times = [1 - k / STEPS for k in range(STEPS)]

    @torch.no_grad()
    def velocity(self, x: Tensor, k: int) -> Tensor:
        t, label = torch.full((len(x),), 1000 * self.times[k]), torch.full((len(x),), 3)
        found: Tensor = self.model(x, timestep=t, class_labels=label).sample
        return 3 * found

    def sensitivity(self, seen: list[Tensor], final: Tensor) -> np.ndarray:
        """By finite differences, as `sensitivities` does on a pipeline."""
        found = [1 / STEPS]
        for k in range(1, STEPS):
            nudge = seen[k - 1] - seen[k]
            moved, _, _ = self.run([tuple(range(STEPS))], {k: nudge})
            found.append(float((moved - final).norm() / nudge.norm()))
        return np.array(found)

    def run(
        self, schedules: list[tuple[int, ...]], nudges: Mapping[int, Tensor] = MappingProxyType({})
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Final latents per schedule, linear prediction; with states and velocities."""
        x, states, seen = self.noise.repeat(len(schedules), 1, 1, 1), [], []
        computed = torch.tensor([[k in keys for k in range(STEPS)] for keys in schedules])
        older = newer = torch.zeros_like(x)
        told, tnew = torch.full((len(x),), 9.0), torch.full((len(x),), 8.0)
        for k in range(STEPS):
            v = self.velocity(x, k)
            share = ((self.times[k] - tnew) / (tnew - told)) if k else torch.zeros(len(x))
            share = torch.where(told > 5, torch.zeros(len(x)), share)  # a single snapshot is held
            guess = newer + share.view(-1, 1, 1, 1) * (newer - older)
            now = computed[:, k]
            used = torch.where(now.view(-1, 1, 1, 1), v, guess)
            older, told = torch.where(now.view(-1, 1, 1, 1), newer, older), torch.where(now, tnew, told)
            newer = torch.where(now.view(-1, 1, 1, 1), v, newer)
            tnew = torch.where(now, torch.full((len(x),), self.times[k]), tnew)
            states.append(x)
            seen.append(v)
            x = x - (used + nudges.get(k, 0)) / STEPS
        return x, states, seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_comes_within_five_percent_of_the_exhaustive_best(seed: int) -> None:
    world = World(seed)
    final, states, seen = world.run([tuple(range(STEPS))])
    everything = [(0, *rest) for n in (3, 5, 7) for rest in combinations(range(1, STEPS), n)]
    ends, _, _ = world.run(everything)
    errors = ((ends - final).flatten(1).norm(dim=1) / final.norm()).tolist()
    replay = Replay.of(seen, states, final, world.times)
    search = ScheduleSearch(replay, None, world.sensitivity(seen, final), names=("linear",))

    def evaluate(schedule: Schedule) -> float:
        return errors[everything.index(schedule.computed)]

    for budget in (4, 6, 8):
        best = min(e for e, keys in zip(errors, everything, strict=True) if len(keys) == budget)
        first = min(search.several(budget, 0, 24, ("linear",)), key=evaluate)
        _, found = local_swaps(search, first, evaluate, evaluate(first), 60, names=("linear",))
        assert found <= 1.05 * best


def test_neighbours_are_single_moves_tail_moves_and_exchanges_each_once() -> None:
    found = list(neighbours((0, 2, 5), (5,), 7))
    assert len(found) == len(set(found))
    assert all(len(computed) == 3 and computed[0] == 0 and max(computed) < 7 for computed, _ in found)
    assert found[0] == ((0, 2, 6), (6,))
    assert ((0, 3, 6), (6,)) in found  # both behind the first
    assert ((0, 1, 4), (4,)) in found
    assert ((0, 2, 5), (2,)) in found
    assert ((0, 2, 5), (5,)) not in found
    assert {computed for computed, _ in found if len({*computed} & {0, 2, 5}) == 2} == {
        *((0, 2, k) for k in (1, 3, 4, 6) if k > 2), (0, 1, 2), *((0, k, 5) for k in (1, 3, 4)), (0, 5, 6),
    }  # fmt: skip
