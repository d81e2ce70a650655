"""EasyCache: the estimate is true on a straight path, over any number of skipped steps; any shape of output."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from patterns import our_run
from scripted import drive
from torch import Tensor

from diffeff.methods.caching.published.easycache import EasyCache
from diffeff.methods.caching.step_cache import latents_in


def ramp(index: int) -> Tensor:
    return torch.full((1, 4), 1.0 + 0.1 * index)


def test_the_estimate_is_the_true_change_whatever_was_skipped_before() -> None:
    """v = 3x on a steady path: each step changes v by 0.3. The published rate divides the change of v over all steps
    since the last but one computed by that of x over one step, so it grows with every skipped step."""
    config = EasyCache(threshold=0.45, warmup=0.0, last=0)
    seen = drive([config], lambda x, branch, i: 3 * x, steps=12, latents=ramp, branches=("cond",))
    computed = seen.computed["cond"]
    assert computed[:3] == [0, 1, 6]  # 5 steps of 0.3 on 3.3 reach 0.45 at the fifth
    gaps = [b - a for a, b in pairwise(computed[1:])]
    assert gaps == sorted(gaps)  # the same change is less and less of a growing output: never sooner
    honest, published = (3 * 0.5) / 0.5, (3 * 0.5) / 0.1  # the rate after the first burst, by both readings
    assert published == pytest.approx(5 * honest)


def test_what_is_held_is_the_output_less_its_input() -> None:
    def model(x: Tensor, branch: str, index: int) -> Tensor:
        return x + (1.0 if branch == "cond" else 2.0)

    seen = drive([EasyCache(threshold=5.0, warmup=0.0)], model, steps=8, latents=ramp)
    assert seen.computed["cond"] == seen.computed["uncond"] == [0, 1, 7]
    for branch, index in (("cond", 4), ("uncond", 5)):
        torch.testing.assert_close(seen.outputs[branch][index], model(ramp(index), branch, index))


def test_conditions_and_predicted_variances_are_no_latents() -> None:
    x, like = torch.arange(6.0).reshape(1, 3, 2), torch.ones(1, 2, 2)
    assert torch.equal(latents_in(x, like), x[:, :2])
    wide = latents_in(x, torch.ones(1, 5, 2))
    assert torch.equal(wide[:, :3], x)
    assert not wide[:, 3:].any()


@pytest.mark.parametrize("family", ["wan", "dit", "sd", "flux-cfg"])
def test_any_model_without_calibration(family: str) -> None:
    skipped, found = our_run(family, EasyCache(threshold=0.5, max_skips=2), 10, guidance=True)
    assert skipped
    assert min(skipped) >= 2
    assert torch.isfinite(found).all()
