"""What an attached plan that does nothing costs: plain and attached denoiser steps, alternated in one process.

`python -m diffeff.eval.overhead` prints one JSON line: the ratio of the medians over rounds, with its spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from diffeff.pipeline import DiffEffPipeline
from diffeff.report import environment
from diffeff.zoo import bundled

__all__ = ["measure_overhead"]


def measure_overhead(model: str = "sprites-wan", rounds: int = 15, steps: int = 10) -> dict[str, object]:
    """Process-CPU time of `rounds` pairs of runs of `steps` steps, plain and with the lossless preset, to the latents.

    Returns the ratio attached / plain of the per-round times: median, minimum, maximum, and the time of a plain step.
    """
    pipe = DiffEffPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    options = {**bundled.recommended(model).call_options(), "num_inference_steps": steps, "output_type": "latent"}
    ratios, plain_steps = [], []
    for number in range(rounds + 1):
        order = ("plain", "attached") if number % 2 else ("attached", "plain")
        seconds = {}
        for which in order:
            pipe.apply("lossless") if which == "attached" else pipe.remove()
            _cpu_seconds(pipe, options | {"num_inference_steps": 1})  # attaching leaves the processor's caches cold
            seconds[which] = _cpu_seconds(pipe, options)
        if number:  # the first round warms up
            ratios.append(seconds["attached"] / seconds["plain"])
            plain_steps.append(seconds["plain"] / steps)
    return {
        "benchmark": "overhead",
        "model": model,
        "rounds": rounds,
        "steps": steps,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "plain_step_ms": round(1e3 * statistics.median(plain_steps), 3),
        "seams_us_per_step": round(_seam_microseconds(pipe, options), 1),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _cpu_seconds(pipe: DiffEffPipeline, options: dict[str, Any]) -> float:
    start = time.process_time()
    pipe("a red circle moving left, camera static", generator=torch.Generator().manual_seed(0), **options)
    return time.process_time() - start


def _seam_microseconds(pipe: DiffEffPipeline, options: dict[str, Any], steps: int = 200, rounds: int = 9) -> float:
    """CPU time that attached seams add to a step, without the noise of the model: its forward is a constant here."""
    pipe.remove()
    denoiser = pipe.denoisers[0].module
    seen = []
    hook = denoiser.register_forward_hook(lambda module, args, result: seen.append(result))
    _cpu_seconds(pipe, options | {"num_inference_steps": 1})
    hook.remove()
    denoiser.forward = lambda *args, **kwargs: seen[0]
    try:
        differences = []
        for _ in range(rounds):
            plain = _cpu_seconds(pipe.remove(), options | {"num_inference_steps": steps})
            attached = _cpu_seconds(pipe.apply("lossless"), options | {"num_inference_steps": steps})
            differences.append(1e6 * (attached - plain) / steps)
    finally:
        pipe.remove()
        del denoiser.forward
    return statistics.median(differences)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites-wan", choices=bundled.NAMES, help="(default: sprites-wan)")
    parser.add_argument("--rounds", type=int, default=15, help="A/B pairs (default: 15)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a run (default: 10)")
    options = parser.parse_args()
    sys.stdout.write(json.dumps(measure_overhead(options.model, options.rounds, options.steps)) + "\n")


if __name__ == "__main__":
    main()
