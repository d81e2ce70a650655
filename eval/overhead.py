"""What an attached plan that does nothing costs: plain and attached denoiser steps, alternated in one process.

`python -m diffeff.eval.overhead` prints one JSON line: the ratio of the medians over rounds, with its spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from diffeff.pipeline import DiffEffPipeline
from diffeff.report import environment

__all__ = ["measure_overhead"]


def measure_overhead(model: str = "sprites-wan", rounds: int = 15, steps: int = 10) -> dict[str, object]:
    """Time `rounds` pairs of runs of `steps` steps, plain and with the lossless preset, denoising stage only.

    Returns the ratio attached / plain of the per-round times: median, minimum, maximum, and the seconds of a step.
    """
    pipe = DiffEffPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    ratios, plain_steps = [], []
    for number in range(rounds + 1):
        order = ("plain", "attached") if number % 2 else ("attached", "plain")
        seconds = {}
        for which in order:
            pipe.apply("lossless") if which == "attached" else pipe.remove()
            seconds[which] = _denoise_seconds(pipe, steps)
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
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _denoise_seconds(pipe: DiffEffPipeline, steps: int) -> float:
    start = time.process_time()
    generator = torch.Generator().manual_seed(0)
    prompt = "a red circle moving left, camera static"
    pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent")
    return time.process_time() - start


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites-wan", help="bundled name, folder or hub id (default: sprites-wan)")
    parser.add_argument("--rounds", type=int, default=15, help="A/B pairs (default: 15)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a run (default: 10)")
    options = parser.parse_args()
    sys.stdout.write(json.dumps(measure_overhead(options.model, options.rounds, options.steps)) + "\n")


if __name__ == "__main__":
    main()
