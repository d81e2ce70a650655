"""FasterCache: factors that do not compound, bands, extrapolated attention."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from scripted import drive
from tiny import make, run
from torch import Tensor

from diffeff.anatomy.types import CFG
from diffeff.core.run import Clock
from diffeff.methods.caching.published.fastercache import FasterCache
from diffeff.methods.guidance.guidance_skip import GuidanceSkip, scale_bands
from diffeff.pipeline import DiffEffPipeline

ALL = {"guidance_below": 2000.0, "attention_below": 2000.0}


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # diffusers' own
def test_diffusers_compounds_its_factors() -> None:
    """The flaw: 1.1, 1.21, 1.33, ... between full steps."""
    pipe = make("cogvideox")
    pipe.transformer.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            unconditional_batch_skip_range=5,
            unconditional_batch_timestep_skip_range=(-1, 2000),
            low_frequency_weight_update_timestep_range=(-1, 2000),
            tensor_format="BFCHW",
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    state = pipe.transformer._diffusers_hook.hooks["faster_cache_denoiser"].state
    sizes: list[float] = []

    def note(_: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        sizes.append(float(state.low_frequency_delta.abs().mean()))
        return kwargs

    run("cogvideox", pipe, steps=5, callback_on_step_end=note)
    assert [size / sizes[0] for size in sizes] == pytest.approx([1.1**k for k in range(5)], rel=1e-4)


@pytest.mark.parametrize("cfg", [CFG.SEPARATE, CFG.BATCHED_UNCOND_FIRST, CFG.BATCHED_COND_FIRST])
def test_a_factor_here_is_a_factor_on_every_layout(cfg: CFG) -> None:
    def model(x: Tensor, branch: str, i: int) -> Tensor:
        return torch.full_like(x, 3.0 if branch == "cond" else 1.0)

    seen = drive([FasterCache(**ALL)], model, steps=10, cfg=cfg, latents=lambda i: torch.ones(1, 2, 8, 8))
    assert seen.computed["uncond"] == [0, 5]
    for i in (1, 2, 3, 4, 6, 7, 8, 9):
        expected = 3.0 - 2.0 * (1.1 if 1000 - 100 * i > 99 else 1.0)  # a constant lies in the coarse band
        torch.testing.assert_close(seen.outputs["uncond"][i], torch.full((1, 2, 8, 8), expected))


def test_bands_are_scaled_apart() -> None:
    rows = torch.arange(16.0)
    coarse = torch.cos(2 * torch.pi * 2 * rows / 16)[:, None].expand(16, 16)
    fine = torch.cos(2 * torch.pi * 6 * rows / 16)[None, :].expand(16, 16)
    torch.testing.assert_close(scale_bands(coarse + fine, 2.0, 0.5), 2 * coarse + 0.5 * fine, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scale_bands(coarse + fine, 1.0, 1.0), coarse + fine)


def test_guidance_skip_with_bands_and_equal_factors_is_its_delta() -> None:
    def model(x: Tensor, branch: str, i: int) -> Tensor:
        return x * (2.0 if branch == "cond" else 0.5 + 0.1 * i)

    latents = [torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    runs = [
        drive([GuidanceSkip(reuse=reuse, scale=1.1, fine_scale=1.1)], model, latents=lambda i: latents[i])
        for reuse in ("delta", "bands")
    ]
    for i in range(8):
        torch.testing.assert_close(runs[0].outputs["uncond"][i], runs[1].outputs["uncond"][i])


def test_attention_leans_on_its_last_two_outputs() -> None:
    config = FasterCache()
    predictor = config._predictor(Clock(total=10))
    assert predictor.coefficients([0.0, 2.0], 5.0) == (-0.5, 1.5)
    assert predictor.coefficients([0.0], 1.0) == (1.0,)
    assert FasterCache(weight=0.3)._predictor(Clock(total=10)).coefficients([0, 2], 3) == (-0.3, 1.3)


@pytest.mark.parametrize("family", ["wan", "sd", "cogvideox", "animatediff"])
def test_both_parts_engage_and_stay_near(family: str) -> None:
    plain = run(family, make(family), steps=12)
    pipe = DiffEffPipeline(make(family), [FasterCache(coarse=1.0, fine=1.0)])
    found = run(family, pipe, steps=12)
    assert pipe.report is not None
    details = pipe.report.methods[0].details
    assert details["skipped_steps"]
    assert all(row["skipped_steps"] for row in details["guidance"].values())
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.1


@pytest.mark.filterwarnings("ignore:fastercache")
def test_lists_of_tokens_take_the_plain_difference_and_say_so() -> None:
    pipe = DiffEffPipeline(make("flux-cfg"), [FasterCache(**ALL)])
    assert torch.isfinite(run("flux-cfg", pipe, steps=8)).all()
    assert pipe.report is not None
    assert any("Fourier" in warning for warning in pipe.report.warnings)
