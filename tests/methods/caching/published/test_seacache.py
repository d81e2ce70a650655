"""SeaCache: diffusers' filter, and skips on every scheduler that has noise levels."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.hooks import SeaCacheConfig
from diffusers.hooks import sea_cache as published
from patterns import diffusers_run, our_run
from tiny import make, run

from diffeff.core.clockwork import wind
from diffeff.core.run import Clock
from diffeff.errors import ConfigError
from diffeff.methods.caching.published.seacache import SeaCache
from diffeff.methods.caching.spectral import signal_and_noise, wiener
from diffeff.pipeline import DiffEffPipeline


def clock(scheduler: object, steps: int = 10) -> Clock:
    found = Clock()
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    wind(found, scheduler)
    found.index = 3
    return found


@pytest.mark.parametrize("sigma", [0.9, 0.4, 0.05])
def test_the_filter_is_diffusers(sigma: float) -> None:
    x = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    found = wiener(x, (2, 3, 4), 1 - sigma, sigma, 3.0)[0]
    expected = published._apply_sea_filter(x[0].movedim(0, -1), sigma, 3.0).movedim(-1, 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0, 5.0])
def test_decides_as_diffusers_does_where_its_pipeline_tells_the_noise_level(threshold: float) -> None:
    theirs, expected = diffusers_run("wan", SeaCacheConfig(threshold=threshold, residual_order=0), 12)
    ours, found = our_run("wan", SeaCache(threshold=threshold, predictor="hold"), 12)
    assert ours == theirs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_diffusers_skips_nothing_where_it_does_not_and_ours_does() -> None:
    theirs, _ = diffusers_run("wan-v2v", SeaCacheConfig(threshold=5.0), 12)
    assert theirs == []
    ours, found = our_run("wan-v2v", SeaCache(threshold=5.0), 12)
    assert ours
    assert torch.isfinite(found).all()


def test_signal_and_noise_follow_the_scheduler() -> None:
    flow = clock(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert signal_and_noise(flow) == pytest.approx((1 - flow.sigma, flow.sigma))
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert sum(signal_and_noise(clock(unipc))) == pytest.approx(1.0)
    for scheduler in (diffusers.DDIMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        signal, noise = signal_and_noise(clock(scheduler))
        assert signal**2 + noise**2 == pytest.approx(1.0)
    ddim = clock(diffusers.DDIMScheduler())
    kept = float(diffusers.DDIMScheduler().alphas_cumprod[int(ddim.timestep)])
    assert signal_and_noise(ddim)[0] == pytest.approx(kept**0.5, rel=1e-4)
    with pytest.raises(ConfigError, match="noise levels"):
        signal_and_noise(Clock(total=3, timesteps=torch.arange(3.0)))


@pytest.mark.parametrize("family", ["flux-cfg", "cogvideox", "ltx", "pixart"])
def test_latents_of_every_layout(family: str) -> None:
    skipped, found = our_run(family, SeaCache(threshold=9.0), 8, guidance=True)
    assert len(skipped) in (3, 4)
    assert torch.isfinite(found).all()


def test_whole_steps_for_unets() -> None:
    pipe = DiffEffPipeline(make("sd"), [SeaCache(site="step", threshold=9.0)])
    assert torch.isfinite(run("sd", pipe, steps=8)).all()
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged
