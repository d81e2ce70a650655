"""TeaCache: decides before the first attention, by a polynomial that never pays back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from patterns import TinyJob, our_run
from tiny import make, run

from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.indicator import Accumulated, Link
from diffeff.methods.caching.published.teacache import TeaCache
from diffeff.pipeline import DiffEffPipeline
from diffeff.search.calibration import calibrate

WAN_RETENTION = (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664)  # the authors', 1.3B


def test_skipped_steps_run_no_attention_at_all() -> None:
    pipe = DiffEffPipeline(make("wan"), [TeaCache(coefficients=(1.0, 0.0), threshold=9.0, max_skips=2)])
    calls: list[int] = []
    for block in pipe.wrapped.transformer.blocks:
        block.attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    run("wan", pipe, steps=8, guidance=False)
    assert pipe.report is not None
    skipped = pipe.report.methods[0].details["transformer"]["skipped_steps"]
    assert skipped == [1, 2, 4, 5]
    assert len(calls) == 4 * 4
    assert pipe.report.blocks["cond"].computed == 4 * 4


@pytest.mark.parametrize("family", ["wan", "flux-cfg", "sd3", "cogvideox", "ltx", "hunyuanvideo", "pixart", "dit"])
def test_every_transformer_shows_its_modulated_input(family: str) -> None:
    config = TeaCache(coefficients=(1.0, 0.0), threshold=9.0, max_skips=1)
    ours, found = our_run(family, config, 6, guidance=True)
    assert ours in ([1, 3], [3])  # batched guidance shows its rows after the first call
    assert torch.isfinite(found).all()


def test_it_sees_the_input_of_the_first_attention() -> None:
    """Its relative change, measured by plain hooks."""
    pipe, seen = make("wan"), []
    pipe.transformer.blocks[0].attn1.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    run("wan", pipe, steps=5, guidance=False)
    steps = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(seen)]
    for factor, skipped in ((1.001, True), (0.999, False)):
        config = TeaCache(coefficients=(1.0, 0.0), threshold=steps[0] * factor, last=0)
        assert (1 in our_run("wan", config, 5)[0]) is skipped


def test_the_published_polynomial_pays_back_and_ours_does_not() -> None:
    def published(x: float) -> float:
        total = 0.0
        for c in WAN_RETENTION:
            total = total * x + c
        return total

    assert published(0.001) < -0.03
    assert sum(published(0.001) for _ in range(100)) < 0  # never reaches any threshold
    assert Link(WAN_RETENTION)(0.001) == 0.0
    assert Link(WAN_RETENTION, low=0.02, high=0.06)(0.001) == pytest.approx(published(0.02))
    assert Link(WAN_RETENTION, low=0.02, high=0.06)(5.0) == pytest.approx(max(published(0.06), 0.0))


def test_changes_are_summed_from_step_to_step_until_one_is_computed() -> None:
    sums = Accumulated(Link((2.0, 0.0)))
    assert sums.change(torch.tensor([1.0])) is None
    assert sums.change(torch.tensor([1.1])) == pytest.approx(0.2)
    assert sums.change(torch.tensor([1.1])) == pytest.approx(0.2)
    sums.computed(torch.tensor([1.1]), None)
    assert sums.change(torch.tensor([2.2])) == pytest.approx(2.0)


def test_calibration_fits_this_model_and_is_kept_to_what_it_saw() -> None:
    config = calibrate(DiffEffPipeline(make("wan")), TinyJob("wan", 10), TeaCache(threshold=0.3))
    assert len(config.coefficients) == 3
    assert 0 < config.range_low < config.range_high
    assert TeaCache.from_dict(config.to_dict()) == config
    assert our_run("wan", config, 14, guidance=True)[0]


def test_without_a_polynomial_or_a_stack_it_is_refused() -> None:
    with pytest.raises(MethodInapplicable, match=r"calibration\.calibrate"):
        DiffEffPipeline(make("wan"), [TeaCache()])
    with pytest.raises(MethodInapplicable, match="change size"):
        DiffEffPipeline(make("sd"), [TeaCache(coefficients=(1.0, 0.0))])
    with pytest.raises(ConfigError, match="range_high"):
        TeaCache(range_low=2.0, range_high=1.0)
