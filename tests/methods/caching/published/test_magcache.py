"""MagCache: diffusers' decisions on the calibrated schedule; neither its restart nor its unscaled residual."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import MagCacheConfig
from patterns import TinyJob, diffusers_run, our_run
from tiny import make

from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.curve import Curve
from diffeff.methods.caching.policy import Action, MagnitudeBudget, Situation
from diffeff.methods.caching.predictor import Polynomial, Scaled
from diffeff.methods.caching.published.magcache import MagCache
from diffeff.pipeline import DiffEffPipeline
from diffeff.search.calibration import calibrate


def table(ratios: list[float], sigmas: list[float]) -> dict[str, Any]:
    """Published ratios of consecutive steps as sizes by noise level."""
    return {"sigmas": tuple(sigmas), "magnitudes": tuple(np.cumprod(ratios).tolist())}


def noise_levels(family: str, steps: int) -> list[float]:
    pipe = DiffEffPipeline(make(family))
    calibrated = calibrate(pipe, TinyJob(family, steps), MagCache())
    return list(calibrated.sigmas)


RATIOS = [1.0, 1.2, 1.1, 1.05, 1.04, 1.01, 1.02, 0.99, 0.98, 1.0, 0.97, 0.9]


@pytest.mark.parametrize("threshold", [0.045, 0.1, 0.3])
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_decides_and_computes_as_diffusers_does(family: str, threshold: float) -> None:
    given = MagCacheConfig(threshold=threshold, max_skip_steps=3, num_inference_steps=12, mag_ratios=RATIOS)
    theirs, expected = diffusers_run(family, given, 12)
    config = MagCache(threshold=threshold, last=0, scale=False, **table(RATIOS, noise_levels(family, 12)))
    ours, found = our_run(family, config, 12)
    assert ours == theirs
    assert theirs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_published_form_starts_again_at_its_own_step_count_and_ours_follows_the_clock() -> None:
    flat = [1.0] * 6
    given = MagCacheConfig(threshold=1.0, max_skip_steps=9, num_inference_steps=6, mag_ratios=flat)
    theirs, _ = diffusers_run("wan", given, 12)
    assert theirs == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]  # step 6 is "the first" again
    ours, _ = our_run("wan", MagCache(threshold=1.0, max_skips=9, **table(flat, [1, 0.9, 0.7, 0.5, 0.3, 0.1])), 12)
    assert ours == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_sizes_by_noise_level_hold_at_twice_the_steps_where_ratios_by_step_do_not() -> None:
    """A residual that grows by 1.21 from sigma 1 to 0: ratios of 1.1 per step at 2 steps would make 1.46 of 4."""
    curve = Curve((1.0, 0.5, 0.0), (1.0, 1.1, 1.21))
    steps = np.linspace(1, 0, 5)
    ratios = [curve(b) / curve(a) for a, b in pairwise(steps)]
    assert np.prod(ratios) == pytest.approx(1.21)
    assert max(ratios) < 1.06


def test_a_residual_that_changes_its_size_alone_is_predicted_exactly() -> None:
    curve = Curve((0.2, 1.0), (2.0, 1.0))
    assert Scaled(curve).coefficients([1.0], 0.2) == (2.0,)
    assert Polynomial(0).coefficients([1.0], 0.2) == (1.0,)  # the published form: half of it


def test_the_budget_is_known_beforehand_and_nothing_is_exact_at_zero() -> None:
    sigmas = (1.0, 0.8, 0.6, 0.4)
    rule = MagnitudeBudget(Curve((1.0, 0.8, 0.6, 0.4), (1.0, 1.1, 1.2, 1.2)), 0.25)
    decide = lambda index, since: rule.decide(Situation(index, 3 - index, since, index=index, sigmas=sigmas))  # noqa: E731
    assert decide(1, 1) is Action.PREDICT  # 0.1
    assert decide(2, 2) is Action.COMPUTE  # 0.1 + 0.2
    assert decide(3, 1) is Action.PREDICT  # 0
    flat = MagnitudeBudget(Curve((1.0,), (1.0,)), 0.0)
    assert flat.decide(Situation(1, 1, 1, index=1, sigmas=sigmas)) is Action.COMPUTE


def test_calibration_measures_the_size_that_diffusers_measures() -> None:
    config = calibrate(DiffEffPipeline(make("wan")), TinyJob("wan", 6), MagCache(threshold=0.2))
    assert config.threshold == 0.2
    assert len(config.sigmas) == len(config.magnitudes) == 6
    assert config.magnitudes[0] == 1.0
    assert MagCache.from_dict(config.to_dict()) == config
    assert our_run("wan", config, 12, guidance=True)[0]


def test_without_a_table_it_is_refused_and_says_how_to_make_one() -> None:
    with pytest.raises(MethodInapplicable, match=r"calibration\.calibrate"):
        DiffEffPipeline(make("wan"), [MagCache()])
    with pytest.raises(ConfigError, match="magnitudes has 1 values for 2 sigmas"):
        MagCache(sigmas=(1.0, 0.5), magnitudes=(1.0,))
