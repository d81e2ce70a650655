"""Whether skipped compute turns into time on real architectures: widths as released, fewer blocks, random weights.

`python -m diffeff.eval.architectures -o eval/results/architectures.jsonl` appends one JSON line per model and cache. A
round is a pair of calls, plain and with the cache, in changing order; a speed-up is the ratio of their times to the
latents, its median over rounds: seconds of the process's CPU time on CPUs, which other work on the machine disturbs
least, wall-clock seconds on a GPU. Compute left is the ratio of floating-point operations of the denoiser, counted
in calls of their own. Random weights say nothing about quality: only speed is measured, so thresholds are forced open
and the pattern of skipped steps is fixed. `holds`: speed-up >= 0.9 / compute left.

float32 on CPUs (bfloat16 is emulated on most), latents small so that all of it runs in minutes on two cores in less
than 6 GB; `--device cuda --dtype bfloat16 --tokens large` is for a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffeff.errors import UnknownName, nearest
from diffeff.eval.bench.flops import counting_flops
from diffeff.eval.bench.rows import append, quartiles
from diffeff.eval.bench.stamp import run_stamp
from diffeff.kernels.microbench import chip
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.zoo.tiny.parts import flow, library, text_free, unipc

__all__ = ["ARCHITECTURES", "BAR", "Architecture", "measure"]

BAR = 0.9
"""The least share of 1 / (compute left) that a speed-up must reach."""
STEPS = 8
_TABLE = ("both", "both", "none", "both", "none", "both", "none", "both")
_FORCED = {"threshold": 10.0, "max_skips": 1, "first": 2, "last": 1}
_SPLIT = {"site": "segment", "interval": 2, "first": 2, "last": 1}
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "feature_cache": {"interval": 2, "first": 2, "last": 1},
    "scheduled_cache": {"actions": _TABLE},
}
_BLOCKS: Mapping[str, Mapping[str, Any]] = {"first_block_cache": _FORCED, "fora": {"interval": 2}}


@dataclass(frozen=True)
class Architecture:
    """One model: how it is built, what a call takes (latents of `small` or `large` size), and the caches to measure."""

    build: Callable[[], Any]
    call: Callable[[tuple[int, int, int]], Mapping[str, Any]]
    small: tuple[int, int, int]
    large: tuple[int, int, int]
    caches: Mapping[str, Mapping[str, Any]]
    note: str


def _wan() -> Any:
    transformer = library.WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=6, in_channels=16, out_channels=16
    )
    return library.WanPipeline(**text_free(), vae=None, transformer=transformer, scheduler=unipc())


def _wan_call(size: tuple[int, int, int]) -> Mapping[str, Any]:
    frames, height, width = size
    pixels = {"num_frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width}
    return {**pixels, "prompt_embeds": torch.randn(1, 64, 4096), "guidance_scale": 1.0}


def _flux() -> Any:
    transformer = library.FluxTransformer2DModel(
        num_layers=1, num_single_layers=3, guidance_embeds=True, axes_dims_rope=(16, 56, 56)
    )
    parts = text_free("vae", "text_encoder_2", "tokenizer_2")
    return library.FluxPipeline(**parts, transformer=transformer, scheduler=flow())


def _flux_call(size: tuple[int, int, int]) -> Mapping[str, Any]:
    text = {"prompt_embeds": torch.randn(1, 64, 4096), "pooled_prompt_embeds": torch.randn(1, 768)}
    return {"height": 8 * size[1], "width": 8 * size[2], **text}


def _sdxl() -> Any:
    unet = library.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    parts = text_free("vae", "text_encoder_2", "tokenizer_2")
    scheduler = library.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading")
    return library.StableDiffusionXLPipeline(**parts, unet=unet, scheduler=scheduler, add_watermarker=False)


def _sdxl_call(size: tuple[int, int, int]) -> Mapping[str, Any]:
    text = {"prompt_embeds": torch.randn(1, 77, 2048), "pooled_prompt_embeds": torch.randn(1, 1280)}
    return {"height": 8 * size[1], "width": 8 * size[2], "guidance_scale": 1.0, **text}


_PAB = {"pab": {"spatial": 2, "cross": 2, "feed_forward": 2, "low": 0.0, "high": 1000.0}}
ARCHITECTURES: Mapping[str, Architecture] = {
    "wan-1.3b": Architecture(
        _wan, _wan_call, (3, 16, 24), (21, 60, 104), {**_SHARED, **_BLOCKS, **_PAB}, "6 of 30 blocks"
    ),
    "flux": Architecture(
        _flux, _flux_call, (1, 24, 24), (1, 128, 128), {**_SHARED, **_BLOCKS}, "1 of 19 double, 3 of 38 single blocks"
    ),
    "sdxl": Architecture(
        _sdxl,
        _sdxl_call,
        (1, 32, 32),
        (1, 128, 128),
        {**_SHARED, "deepcache": {"interval": 2}, "fora": {"interval": 2}},
        "2 of 10 transformer layers at the lowest resolution, 1 of 2 at the middle one",
    ),
}


def measure(
    name: str, rounds: int = 3, device: str = "cpu", dtype: str = "float32", large: bool = False
) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per cache of an architecture. Raises UnknownName for one that is not listed."""
    if name not in ARCHITECTURES:
        raise UnknownName(f"there is no architecture {name!r}. {nearest(name, ARCHITECTURES)}")
    made, stamp = ARCHITECTURES[name], run_stamp()
    timer = _Timer(made, made.large if large else made.small, device, dtype)
    plain = timer.operations(Plan([]))
    for cache, options in made.caches.items():
        plan = Plan.from_dict({"diffeff_plan": 1, "methods": [{"use": cache, **options}]})
        left = timer.operations(plan) / plain
        pairs = [timer.pair(plan, plain_first=bool(number % 2)) for number in range(rounds)]
        yield _row(name, cache, dict(options), left, pairs) | timer.facts() | stamp


def _row(
    name: str, cache: str, options: dict[str, Any], left: float, pairs: list[tuple[float, float]]
) -> dict[str, Any]:
    found = quartiles([a / b for a, b in pairs]) or {}
    return {
        "benchmark": "architectures",
        "model": name,
        "note": ARCHITECTURES[name].note,
        "method": cache,
        "options": options,
        "compute_left": round(left, 4),
        "speedup": found,
        "bar": round(BAR / left, 4),
        "share_of_ideal": round(found["median"] * left, 4),
        "holds": found["median"] >= BAR / left,
        "plain_seconds": quartiles([a for a, _ in pairs]),
        "cached_seconds": quartiles([b for _, b in pairs]),
        "rounds": len(pairs),
    }


class _Timer:
    """One architecture in memory, called plain and under plans."""

    def __init__(self, made: Architecture, size: tuple[int, int, int], device: str, dtype: str) -> None:
        self.device, self.dtype, self.size = torch.device(device), getattr(torch, dtype), size
        torch.manual_seed(0)
        self.pipe = DiffEffPipeline(made.build().to(self.device, self.dtype))
        self.pipe.set_progress_bar_config(disable=True)
        call = made.call(size)
        self.call = {k: v.to(self.device, self.dtype) if isinstance(v, torch.Tensor) else v for k, v in call.items()}

    def operations(self, plan: Plan) -> int:
        """Floating-point operations of the denoiser in one call; it warms up, too."""
        self._apply(plan)
        with counting_flops([self.pipe.denoisers[0].module]) as flops:
            self._run()
        return flops.count

    def pair(self, plan: Plan, plain_first: bool) -> tuple[float, float]:
        """Seconds of a plain call and of one under the plan."""
        seconds = {}
        for chosen in (Plan([]), plan) if plain_first else (plan, Plan([])):
            self._apply(chosen)
            seconds[chosen is plan] = self._run()
        return seconds[False], seconds[True]

    def _apply(self, plan: Plan) -> None:
        self.pipe.apply(plan) if plan.methods else self.pipe.remove()

    def _run(self) -> float:
        generator = torch.Generator().manual_seed(0)
        start = self._now()
        self.pipe(**self.call, num_inference_steps=STEPS, generator=generator, output_type="latent")
        return self._now() - start

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """What a row tells besides its figures."""
        parameters = sum(p.numel() for p in self.pipe.denoisers[0].module.parameters())
        return {
            "parameters": parameters,
            "latents": list(self.size),
            "steps": STEPS,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "environment": environment() | {"processor": chip(self.device)},
        }


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), action="append", help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="A/B pairs (default: 3)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", default="small", choices=("small", "large"), help="size of the latents")
    parser.add_argument("-o", "--output", type=Path, help="JSON lines are appended here, too")
    options = parser.parse_args()
    for name in options.model or ARCHITECTURES:
        gc.collect()  # the model before
        for row in measure(name, options.rounds, options.device, options.dtype, options.tokens == "large"):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            if options.output is not None:
                append(options.output, [row])


if __name__ == "__main__":
    main()
