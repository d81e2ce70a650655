"""MeanCache: the published recursion, and a table that dynamic programming finds exactly."""

from __future__ import annotations

from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from patterns import TinyJob, our_run
from tiny import make, run

from diffeff.core.clockwork import wind
from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.curve import nearest_entries
from diffeff.methods.caching.informed import MeanVelocity
from diffeff.methods.caching.published.meancache import MeanCache, no_velocities
from diffeff.methods.caching.track import Moment, Snapshot
from diffeff.pipeline import DiffEffPipeline
from diffeff.search.calibration import calibrate
from diffeff.search.mean_velocity import best_path

SIGMAS = (1.0, 0.8, 0.7, 0.4, 0.1)


def moments() -> list[Moment]:
    ends = (*SIGMAS[1:], 0.0)
    return [Moment(i, s, i, 4 - i, SIGMAS, end) for i, (s, end) in enumerate(zip(SIGMAS, ends, strict=True))]


@pytest.mark.parametrize("span", [1, 2, 3])
def test_weights_are_the_published_recursion(span: int) -> None:
    """u = (z_end - z_r) / (s_end - s_r) over Euler steps, then v - (v_r - u) / (s_end - s_r) * (s_next - s_end)."""
    velocities, at = np.array([1.0, 3.0, -2.0]), moments()
    history = [Snapshot(at[i], (torch.tensor([v]),)) for i, v in enumerate(velocities)]
    weights = MeanVelocity((1.0,), (span,)).weigh(history, at[3], None)
    s = np.array(SIGMAS)
    r = 3 - span
    z = np.concatenate([[0.0], np.cumsum(velocities * np.diff(s)[:3])])
    u = (z[3] - z[r]) / (s[3] - s[r])
    turn = (velocities[r] - u) / (s[3] - s[r])
    assert float(np.dot(weights, velocities)) == pytest.approx(velocities[-1] - turn * (s[4] - s[3]))


def test_spans_belong_to_the_stretch_after_a_level() -> None:
    rule = MeanVelocity((1.0, 0.5, 0.2), (1, 4, 2))
    assert [rule.span(s) for s in (0.9, 0.51, 0.4, 0.1)] == [1, 1, 4, 2]


def test_the_path_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = np.where(np.triu(np.ones((8, 9)), 1) > 0, rng.random((8, 9)), np.inf)
        found = best_path(costs, 4, 4.0)
        total = {
            path: sum(costs[a, b] ** 4 for a, b in zip(path, (*path[1:], 8), strict=True))
            for path in ((0, *rest) for rest in combinations(range(1, 8), 3))
        }
        assert total[found] == pytest.approx(min(total.values()))


def test_levels_keep_their_number_at_another_number_of_steps() -> None:
    assert nearest_entries((1.0, 0.9, 0.1), (1.0, 0.5, 0.0)) == (0, 1, 2)
    assert nearest_entries((1.0, 0.5), np.linspace(1, 0, 11).tolist()) == (0, 5)


def test_calibrated_it_beats_the_same_number_of_evenly_spaced_calls() -> None:
    plain = run("wan", make("wan"), steps=12)
    config = calibrate(DiffEffPipeline(make("wan")), TinyJob("wan", 12), MeanCache(computed=6))
    assert len(config.sigmas) == 6
    skipped, found = our_run("wan", config, 12, guidance=True)
    assert len(skipped) == 6
    even = MeanCache(sigmas=config.sigmas[:1] + tuple(np.linspace(0.9, 0.2, 5).tolist()), spans=(1,) * 6)
    _, other = our_run("wan", even, 12, guidance=True)
    near, far = (float((y - plain).norm()) for y in (found, other))
    assert near < far


def test_without_a_table_it_is_refused() -> None:
    with pytest.raises(MethodInapplicable, match=r"calibration\.calibrate"):
        DiffEffPipeline(make("wan"), [MeanCache()])
    with pytest.raises(ConfigError, match="falling"):
        MeanCache(sigmas=(0.5, 1.0), spans=(1, 1))
    with pytest.raises(ConfigError, match="computed is 12"):
        calibrate(DiffEffPipeline(make("wan")), TinyJob("wan", 8), MeanCache(computed=12))


@pytest.mark.parametrize("family", ["sd", "pixart", "cogvideox"])
def test_models_that_predict_no_velocity_are_refused_with_a_way_out(family: str) -> None:
    """Noise (sd, pixart) and the v of variance-preserving schedules (cogvideox)."""
    pipe = DiffEffPipeline(make(family), [MeanCache(sigmas=(1.0, 0.5), spans=(1, 1))])
    with pytest.raises(MethodInapplicable, match=r"none of flow matching.*Use spectrum or taylorseer"):
        run(family, pipe, steps=10)
    pipe.remove()
    with pytest.raises(MethodInapplicable, match="none of flow matching"):
        calibrate(pipe, TinyJob(family, 10), MeanCache(computed=4))


def test_schedules_that_repeat_noise_levels_are_refused() -> None:
    clock, heun = Clock(), diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    heun.set_timesteps(10)
    wind(clock, heun)
    assert "repeats some" in no_velocities(clock)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(10)
    wind(clock, euler)
    assert not no_velocities(clock)
