"""The caches that diffusers itself brings: `enable_cache`, one at a time, on transformers with CacheMixin."""

from __future__ import annotations

import ast
import inspect
import io
from contextlib import redirect_stdout
from typing import Any

from diffeff.errors import DiffEffError
from diffeff.eval.bench.peers import Request, Undo

__all__ = ["faster_cache", "first_block", "mag_cache", "pyramid", "sea_cache", "taylor_seer"]


def first_block(request: Request) -> Undo:
    """FirstBlockCacheConfig: skip the other blocks while the first one's residual changes little."""
    from diffusers import FirstBlockCacheConfig

    return _enable(request, FirstBlockCacheConfig(**request.options))


def taylor_seer(request: Request) -> Undo:
    """TaylorSeerCacheConfig in its lite mode: the default mode matches no layer of most transformers."""
    from diffusers import TaylorSeerCacheConfig

    return _enable(request, TaylorSeerCacheConfig(use_lite_mode=True, **request.options))


def sea_cache(request: Request) -> Undo:
    """SeaCacheConfig: skip while the spectral-evolution-aware change stays below a budget."""
    from diffusers import SeaCacheConfig

    return _enable(request, SeaCacheConfig(**request.options))


def pyramid(request: Request) -> Undo:
    """PyramidAttentionBroadcastConfig: attention outputs are reused within the tool's default range of timesteps."""
    from diffusers import PyramidAttentionBroadcastConfig

    return _enable(
        request, PyramidAttentionBroadcastConfig(**request.options, current_timestep_callback=_clock(request.pipe))
    )


def faster_cache(request: Request) -> Undo:
    """FasterCacheConfig with the tensor layout of the pipeline's latents."""
    from diffusers import FasterCacheConfig

    name = type(request.pipe).__name__
    layout = "BFCHW" if name.startswith("CogVideoX") else "BCFHW" if _makes_video(request.pipe) else "BCHW"
    return _enable(
        request,
        FasterCacheConfig(
            **request.options,
            tensor_format=layout,
            is_guidance_distilled=name.startswith("Flux"),
            current_timestep_callback=_clock(request.pipe),
        ),
    )


def mag_cache(request: Request) -> Undo:
    """MagCacheConfig, after the tool's own calibration run, once per model and number of steps."""
    from diffusers import MagCacheConfig

    ratios = request.notes.get("mag_ratios")
    if ratios is None:
        ratios = request.notes["mag_ratios"] = _calibrated(request)
    return _enable(
        request, MagCacheConfig(**request.options, num_inference_steps=request.steps, mag_ratios=list(ratios))
    )


def _calibrated(request: Request) -> list[float]:
    """The ratios that MagCache prints; with guidance it prints one list per branch, the conditional one first."""
    from diffusers import MagCacheConfig

    undo = _enable(request, MagCacheConfig(calibrate=True, num_inference_steps=request.steps))
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            request.run()
    finally:
        undo()
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    found = [ast.literal_eval(line) for line in lists if not line.startswith("[MagCache]")]
    if not found:
        raise DiffEffError(f"MagCache's calibration over {request.steps} steps printed no ratios")
    return [round(float(value), 6) for value in found[0]]


def _enable(request: Request, config: Any) -> Undo:
    denoiser = request.denoiser
    denoiser.enable_cache(config)

    def undo() -> None:
        denoiser.disable_cache()

    return undo


def _clock(pipe: Any) -> Any:
    """The present timestep as a number: what the caches compare with their ranges."""
    return lambda: float(pipe.current_timestep)


def _makes_video(pipe: Any) -> bool:
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters
