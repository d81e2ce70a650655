"""TaylorSeer: exact on polynomials where the published sum is not; every site; diffusers' lite mode for comparison."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import TaylorSeerCacheConfig
from patterns import diffusers_run, our_run
from scripted import drive
from tiny import make, run
from torch import Tensor

from diffeff.methods.caching.published.taylorseer import TaylorSeer


def quadratic(x: Tensor, branch: str, index: int) -> Tensor:
    """Quadratic in sigma, which the scripted schedule lowers by 1/12 per step."""
    sigma = 1 - index / 12
    return torch.full_like(x, 1 + 2 * sigma - 5 * sigma**2)


def test_order_two_is_exact_on_quadratics_and_the_published_form_is_not() -> None:
    worst = {}
    for form in ("newton", "taylor"):
        config = TaylorSeer(order=2, interval=3, form=form, site="step")  # type: ignore[arg-type]
        seen = drive([config], quadratic, steps=12)
        assert seen.computed["cond"] == [0, 1, 2, 5, 8, 11]
        errors = [float((y - quadratic(y, "cond", i)).abs().max()) for i, y in seen.outputs["cond"].items()]
        worst[form] = max(errors)
    assert worst["newton"] < 1e-5
    assert worst["taylor"] > 0.05


@pytest.mark.parametrize("site", ["stack", "modules", "step"])
def test_every_site_follows_a_smooth_model(site: str) -> None:
    plain = run("wan", make("wan"), steps=14, guidance=False)
    skipped, found = our_run("wan", TaylorSeer(site=site, interval=2), 14)  # type: ignore[arg-type]
    assert skipped == [3, 5, 7, 9, 11]
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.05


def test_the_stack_on_flux_stays_near_the_plain_run_where_lite_mode_leaves_it() -> None:
    """diffusers' lite mode zeroes the blocks, so what the last norm scales is gone; only proj_out is predicted."""
    plain = run("flux", make("flux"), steps=14, guidance=False)
    ours, found = our_run("flux", TaylorSeer(interval=4), 14)
    lite = TaylorSeerCacheConfig(cache_interval=4, use_lite_mode=True, taylor_factors_dtype=torch.float32)
    theirs, other = diffusers_run("flux", lite, 14)
    assert len(ours) >= len(theirs) > 0
    near, far = (float((y - plain).norm() / plain.norm()) for y in (found, other))
    assert near < far
