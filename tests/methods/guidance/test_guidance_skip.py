"""GuidanceSkip: the maths with a scripted denoiser, the calls with tiny pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted import drive
from tiny import call_kwargs, make, run
from torch import Tensor

from diffeff.anatomy.types import CFG
from diffeff.errors import ConfigError
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.guidance.guidance_skip import GuidanceSkip, estimate, similarity

# numpy 2 about diffusers' schedulers
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
ALL_CFG = [CFG.SEPARATE, CFG.BATCHED_UNCOND_FIRST, CFG.BATCHED_COND_FIRST]
CONFIGS = {
    "interval": GuidanceSkip(first=2, last=1),
    "window": GuidanceSkip(policy="window", start=0.3, stop=0.6),
    "adaptive": GuidanceSkip(policy="adaptive", threshold=-1.0, first=2, last=1),
}


def constant_delta(x: Tensor, branch: str, index: int) -> Tensor:
    """eps_u = eps_c + 4, exactly representable; eps_c changes from step to step."""
    return x.round() * 2 + index + (4.0 if branch == "uncond" else 0.0)


def close_from(entry: int) -> Any:
    """Branches at a right angle before `entry`, equal from there on."""

    def model(x: Tensor, branch: str, index: int) -> Tensor:
        found = torch.zeros_like(x)
        found[:, 0 if branch == "cond" or index >= entry else 1] = 1.0
        return found

    return model


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_a_constant_delta_is_exact(cfg: CFG) -> None:
    seen = drive([GuidanceSkip(interval=3, first=1, last=0)], constant_delta, cfg=cfg, batch=2)
    assert seen.computed == {"cond": list(range(8)), "uncond": [0, 3, 6]}
    for index, found in seen.outputs["uncond"].items():
        assert torch.equal(found, constant_delta(torch.full_like(found, 1 + 0.1 * index), "uncond", index))
        assert torch.equal(found - 4, seen.outputs["cond"][index])


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_hold_and_none(cfg: CFG) -> None:
    hold = drive([GuidanceSkip(reuse="hold", first=1, last=0)], constant_delta, cfg=cfg)
    assert torch.equal(hold.outputs["uncond"][3], hold.outputs["uncond"][2])
    none = drive([GuidanceSkip(reuse="none", first=1, last=0)], constant_delta, cfg=cfg)
    assert torch.equal(none.outputs["uncond"][3], none.outputs["cond"][3])


def test_scale_of_the_delta() -> None:
    cond, delta = torch.ones(1, 3), torch.full((1, 3), 2.0)
    assert torch.equal(estimate(cond, delta, "delta", 0.5), torch.full((1, 3), 2.0))
    assert estimate(cond, None, "none") is not cond


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_interval_of_one_and_a_threshold_above_one_are_exact(cfg: CFG) -> None:
    plain = drive([], constant_delta, cfg=cfg)
    for config in (GuidanceSkip(interval=1), GuidanceSkip(policy="adaptive", threshold=1.01)):
        seen = drive([config], constant_delta, cfg=cfg)
        assert seen.computed == plain.computed
        assert all(torch.equal(seen.outputs[b][i], x) for b, xs in plain.outputs.items() for i, x in xs.items())
        assert not seen.engaged()[0]


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_adaptive_drops_for_good_after_the_warm_up(cfg: CFG) -> None:
    seen = drive([GuidanceSkip(policy="adaptive", threshold=-1.0, first=3, last=0)], constant_delta, cfg=cfg)
    assert seen.computed["uncond"] == [0, 1, 2]
    late = drive([GuidanceSkip(policy="adaptive", threshold=0.99, first=2, last=1)], close_from(4), cfg=cfg)
    assert late.computed["uncond"] == [0, 1, 2, 3, 4, 7]
    assert late.details()["transformer"]["dropped_at"] == 4


def test_adaptive_waits_for_every_row() -> None:
    cond = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert similarity(cond, torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == 0.0
    assert similarity(cond, cond) == 1.0


@pytest.mark.parametrize("cfg", ALL_CFG)
def test_window_by_progress_and_by_sigma(cfg: CFG) -> None:
    """Eight steps: progress i / 8, sigma 1 - i / 8."""
    seen = drive([GuidanceSkip(policy="window", start=0.25, stop=0.5)], constant_delta, cfg=cfg)
    assert seen.computed["uncond"] == [2, 3, 4]
    seen = drive([GuidanceSkip(policy="window", unit="sigma", start=0.25, stop=0.5)], constant_delta, cfg=cfg)
    assert seen.computed["uncond"] == [4, 5, 6]
    assert torch.equal(seen.outputs["uncond"][0], seen.outputs["cond"][0])


def test_window_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="greater than start"):
        GuidanceSkip(policy="window", start=0.5, stop=0.5)
    nans = torch.full((8,), float("nan"))
    with pytest.raises(ConfigError, match="no sigmas"):
        drive([GuidanceSkip(policy="window", unit="sigma")], constant_delta, sigmas=nans)


def test_evaluations_are_counted() -> None:
    seen = drive([GuidanceSkip(first=2, last=1)], constant_delta)
    found = seen.details()["transformer"]
    assert (found["computed"], found["total"]) == (len(seen.computed["uncond"]), 8)
    assert found["skipped_steps"] == [2, 4, 6]
    assert seen.engaged() == (True, "the unconditional branch was left out at 3 of 8 steps")


@pytest.mark.parametrize(("branches", "why"), [(("cond",), "guidance is off"), (("uncond", "cond"), "before")])
def test_where_there_is_nothing_to_skip_the_report_says_why(branches: tuple[str, ...], why: str) -> None:
    seen = drive([GuidanceSkip()], constant_delta, branches=branches)
    engaged, reason = seen.engaged()
    assert not engaged
    assert why in reason


def test_experts_do_not_share_deltas() -> None:
    seen = drive([GuidanceSkip(first=2, last=0)], constant_delta, expert=lambda i: "one" if i < 3 else "two")
    assert 3 in seen.computed["uncond"]


@pytest.mark.parametrize("cfg", ALL_CFG)
@pytest.mark.parametrize("phase", [2, 3, 4])
def test_with_a_cache_each_branch_keeps_its_own_history(cfg: CFG, phase: int) -> None:
    """The cache sees whole calls at some steps and conditional rows only at others."""

    def line(x: Tensor, branch: str, index: int) -> Tensor:
        return torch.full_like(x, (2.0 if branch == "cond" else -3.0) * (1 - index / 12) + 0.5)

    plan = [GuidanceSkip(interval=phase, first=3, last=1), FeatureCache(interval=2, first=3, last=1)]
    seen = drive(plan, line, steps=12, cfg=cfg)
    assert seen.computed["cond"] == [0, 1, 2, 4, 6, 8, 10, 11]
    assert set(seen.computed["uncond"]) < set(range(12))
    for index, found in seen.outputs["cond"].items():
        torch.testing.assert_close(found, line(found, "cond", index), atol=1e-6, rtol=0)
    for index in set(range(12)) - set(seen.details(0)["transformer"]["skipped_steps"]):
        found = seen.outputs["uncond"][index]
        torch.testing.assert_close(found, line(found, "uncond", index), atol=1e-5, rtol=0)


# --- real pipelines -----------------------------------------------------------------------------------------------
GUIDED = ["wan", "wan-2expert", "cogvideox", "flux-cfg", "sd3", "pixart", "dit", "sd", "sdxl", "animatediff", "svd"]


@pytest.fixture
def wrap() -> Any:
    return pytest.importorskip("diffeff.pipeline").DiffEffPipeline


@pytest.mark.parametrize("family", ["wan", "flux-cfg", "sd", "svd"])
def test_exact_settings_are_bit_identical(wrap: Any, family: str) -> None:
    plain = run(family, make(family))
    assert torch.equal(run(family, wrap(make(family), [GuidanceSkip(interval=1)])), plain)


@pytest.mark.parametrize(
    ("family", "policy"),
    [(f, "interval") for f in GUIDED] + [(f, p) for f in ("wan", "sd") for p in ("window", "adaptive")],
)
def test_branch_is_left_out_and_the_report_counts_it(wrap: Any, family: str, policy: str) -> None:
    pipe = wrap(make(family), [CONFIGS[policy]])
    found = run(family, pipe, steps=8)
    shares = pipe.report.steps
    assert torch.isfinite(found).all()
    assert shares["cond"].computed == shares["cond"].total == 8
    assert 0 < shares["uncond"].computed < shares["uncond"].total == 8
    assert pipe.report.methods[0].engaged


@pytest.mark.parametrize("family", ["wan", "sd"])
def test_guidance_off_beyond_the_window_is_the_conditional_run(wrap: Any, family: str) -> None:
    """A window that holds no step is the run without guidance."""
    alone = run(family, make(family), guidance=False)
    nowhere = GuidanceSkip(policy="window", start=0.99, stop=1.0)
    torch.testing.assert_close(run(family, wrap(make(family), [nowhere])), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["wan", "sd", "flux"])
def test_without_guidance_it_stands_aside(wrap: Any, family: str) -> None:
    plain = run(family, make(family), guidance=False)
    pipe = wrap(make(family), [GuidanceSkip()])
    assert torch.equal(run(family, pipe, guidance=False), plain)
    assert not pipe.report.methods[0].engaged
    assert "no unconditional branch" in pipe.report.methods[0].reason


@pytest.mark.parametrize("site", ["step", "segment"])
@pytest.mark.parametrize("family", ["wan", "cogvideox", "sd", "animatediff"])
def test_composes_with_a_cache(wrap: Any, family: str, site: Any) -> None:
    plan = [GuidanceSkip(interval=4, first=3, last=1), FeatureCache(site=site, interval=2, first=3, last=1)]
    pipe = wrap(make(family), plan)
    found = run(family, pipe, steps=10, batch=2)
    assert torch.equal(run(family, pipe, steps=10, batch=2), found)
    assert all(m.engaged for m in pipe.report.methods)
    blocks = pipe.report.blocks
    assert blocks["uncond"].computed < blocks["cond"].computed < blocks["cond"].total


def test_interrupted_run_leaves_nothing(wrap: Any) -> None:
    def stop(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 4:
            raise InterruptedError
        return kwargs

    pipe = wrap(make("sd"), [CONFIGS["adaptive"]])
    with pytest.raises(InterruptedError):
        pipe(**call_kwargs("sd", pipe, steps=8), callback_on_step_end=stop)
    fresh = run("sd", wrap(make("sd"), [CONFIGS["adaptive"]]), seed=1, steps=8)
    assert torch.equal(run("sd", pipe, seed=1, steps=8), fresh)
