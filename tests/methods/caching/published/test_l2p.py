"""L2P: fitted weights are the best ones, correction included, and are kept by plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from patterns import TinyJob
from tiny import make

from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods import L2P
from diffeff.methods.caching.fitted import Corrected, Fitted
from diffeff.methods.caching.predictor import Polynomial, combine
from diffeff.methods.caching.track import Moment, Snapshot
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.search.calibration import calibrate
from diffeff.search.predictor_fit import _reduced_rank
from diffeff.search.trace import Trace, record

STEPS = 9


@pytest.fixture(scope="module")
def recorded() -> tuple[DiffEffPipeline, TinyJob, Trace]:
    pipe, job = DiffEffPipeline(make("ltx")), TinyJob("ltx", STEPS)
    return pipe, job, record(pipe, job)


def misses(config: L2P, trace: Trace) -> float:
    """Squared error of all predicted steps of the recorded run, both branches."""
    total = 0.0
    for outputs in (trace.cond, trace.uncond):
        for k, known in [(k, [c for c in config.computed(STEPS) if c < k][-3:]) for k in range(STEPS)]:
            if k in config.computed(STEPS):
                continue
            moments = [Moment(i, trace.times[i], i, STEPS - 1 - i) for i in (*known, k)]
            history = [Snapshot(m, (outputs[m.index],)) for m in moments[:-1]]
            guess = config.predictor().fill(history, [outputs[c] for c in known], moments[-1])  # type: ignore[union-attr]
            total += float((guess - outputs[k]).double().square().sum())
    return total


def line(trace: Trace) -> float:
    """The same with a line."""
    total, config = 0.0, L2P()
    for outputs in (trace.cond, trace.uncond):
        for k in set(range(STEPS)) - set(config.computed(STEPS)):
            a, b = [c for c in config.computed(STEPS) if c < k][-2:]
            weights = Polynomial(1).coefficients([trace.times[a], trace.times[b]], trace.times[k])
            guess = combine([outputs[a], outputs[b]], weights)
            total += float((guess - outputs[k]).double().square().sum())
    return total


def test_what_is_computed_follows_the_interval_and_the_protected_steps() -> None:
    assert L2P(interval=3, first=2, last=1).computed(10) == [0, 1, 4, 7, 9]
    assert L2P(interval=1).computed(4) == [0, 1, 2, 3]


def test_fitted_sums_miss_less_than_a_line_and_groups_and_corrections_less_again(
    recorded: tuple[DiffEffPipeline, TinyJob, Trace],
) -> None:
    pipe, job, trace = recorded
    found = {
        name: calibrate(pipe, job, config)
        for name, config in {
            "none": L2P(),
            "channels": L2P(groups="channels"),
            "bands": L2P(groups="bands"),
            "rank": L2P(rank=2),
        }.items()
    }
    errors = {name: misses(config, trace) for name, config in found.items()}
    assert errors["none"] < line(trace)
    assert errors["channels"] < errors["none"]
    assert errors["bands"] < errors["none"]
    assert errors["rank"] < errors["none"]
    assert isinstance(found["rank"].predictor(), Corrected)
    assert isinstance(found["channels"].predictor(), Fitted)
    assert max(found["channels"].members) == 3
    assert all(L2P.from_dict(config.to_dict()) == config for config in found.values())
    pipe.apply(Plan([found["rank"]]))
    job.run(pipe)
    assert pipe.report is not None
    assert pipe.report.methods[0].details["transformer"]["skipped_steps"] == [3, 4, 6, 7]
    pipe.remove()


def test_without_weights_it_is_refused_with_the_way_to_make_them() -> None:
    with pytest.raises(MethodInapplicable, match="calibrate"):
        DiffEffPipeline(make("ltx")).apply(Plan([L2P()]))


def test_numbers_of_values_must_fit() -> None:
    with pytest.raises(ConfigError, match="need 3 and 1"):
        L2P(times=(0.5,), horizons=(1,), weights=(1.0,))
    good = L2P(times=(0.5,), horizons=(1,), weights=(0.0, 0.0, 1.0), rank=1)
    with pytest.raises(ConfigError, match="2 matrices"):
        replace(good, out=(1.0,), into=(1.0, 1.0, 1.0))


def test_a_reduced_rank_regression_finds_a_map_of_that_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = torch.randn(6, 500, generator=draw)
    truth = torch.randn(4, 2, generator=draw) @ torch.randn(2, 6, generator=draw)
    out, into = _reduced_rank(seen, truth @ seen, 2)
    assert out.shape == (4, 2)
    assert torch.allclose((out @ into).float(), truth, atol=0.02)
    less, more = (_reduced_rank(seen, truth @ seen, rank) for rank in (1, 6))
    assert float((less[0] @ less[1] - truth).norm()) > 0.1
    assert more[0].shape == (4, 6)
