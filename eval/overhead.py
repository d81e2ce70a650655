"""What an attached plan that does nothing costs: plain and attached denoiser steps, alternated in one process.

`python -m diffeff.eval.overhead` prints one JSON line: the ratio attached / plain, its median over rounds and its
spread. `python -m diffeff.eval.overhead --caches` prints one for every cache that acts on the model, with options that
skip nothing: what its measuring and remembering costs where nothing is gained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from diffeff.eval.bench.stamp import run_stamp
from diffeff.methods.caching.recipe import CacheConfig
from diffeff.methods.table import TABLE, config_class
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.zoo import bundled
from diffeff.zoo.tiny import SMALL

__all__ = ["idle_plans", "measure_idle", "measure_overhead"]

LIMIT = 1.02
"""The most an idle cache may cost: attached / plain."""
_EVERY = tuple(1 - i / 1000 for i in range(1000))
_IDLE: Mapping[str, Mapping[str, Any]] = {
    "spectrum": {"window": 1.0, "growth": 0.0},
    "meancache": {"sigmas": _EVERY, "spans": (1,) * len(_EVERY)},
    "pab": {"spatial": 1, "temporal": 1, "cross": 1, "feed_forward": 1},
    "step_rehash": {"share": 0.0},
    "harmonica": {"router": ("11111",) * 2},
    "tgate": {"gate": 1.0, "early_interval": 1, "late_interval": 1},
    "fastercache": {"interval": 1, "guidance_interval": 1},
    "adacache": {"limits": (1.0,), "intervals": (1,)},
    "profilingdit": {"warm_up": 1.0},
    "scheduled_cache": {"actions": ("both",) * 64},
}
"""Options that skip nothing, of caches that have neither a threshold nor an interval that says so."""


def idle_plans() -> dict[str, Plan]:
    """Every cache of the table, by name, with options at which it measures and remembers but skips nothing."""
    names = [n for n in TABLE if issubclass(config_class(n), CacheConfig) or n == "scheduled_cache"]
    return {name: Plan([config_class(name).from_dict({**SMALL.get(name, {}), **_idle(name)})]) for name in names}


def _idle(name: str) -> Mapping[str, Any]:
    if name in _IDLE:
        return _IDLE[name]
    known = config_class(name).__dataclass_fields__
    return {"interval": 1} if "interval" in known else {"threshold": 0.0}


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


def measure_idle(model: str = "sprites-wan", rounds: int = 15, steps: int = 10) -> Iterator[dict[str, object]]:
    """One row per cache that acts on the model: process-CPU time of `rounds` pairs of runs, plain and with the cache
    skipping nothing, to the latents. Rounds go through all caches, so that a drift of the machine hits all alike.

    `said_so`: whether the report said that nothing was skipped. `holds`: whether the median is at most LIMIT.
    """
    pipe = DiffEffPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    options = {**bundled.recommended(model).call_options(), "num_inference_steps": steps, "output_type": "latent"}
    plans = {n: p for n, p in idle_plans().items() if all(row.applies for row in p.check(pipe.denoisers))}
    ratios: dict[str, list[float]] = {name: [] for name in plans}
    reasons: dict[str, str] = {}
    for number in range(rounds + 1):
        for name, plan in plans.items():
            ratio, reason = _pair(pipe, plan, options, plain_first=number % 2 == 1)
            reasons[name] = reason
            ratios[name] += [ratio] if number else []  # the first round warms up
    stamp = run_stamp()
    for name, found in ratios.items():
        yield {
            "benchmark": "idle_caches",
            "model": model,
            "method": name,
            "rounds": rounds,
            "steps": steps,
            "ratio_median": round(statistics.median(found), 4),
            "ratio_min": round(min(found), 4),
            "ratio_max": round(max(found), 4),
            "limit": LIMIT,
            "holds": statistics.median(found) <= LIMIT,
            "said_so": "nothing was skipped" in reasons[name],
            "threads": torch.get_num_threads(),
            "environment": environment(),
            **stamp,
        }


def _pair(pipe: DiffEffPipeline, plan: Plan, options: dict[str, Any], plain_first: bool) -> tuple[float, str]:
    """Time attached / plain, and what the report said of the cache."""
    seconds, reason = {}, ""
    for attached in (False, True) if plain_first else (True, False):
        pipe.apply(plan) if attached else pipe.remove()
        _cpu_seconds(pipe, options | {"num_inference_steps": 2})  # attaching leaves the processor's caches cold
        seconds[attached] = _cpu_seconds(pipe, options)
        if attached and pipe.report is not None:
            reason = pipe.report.methods[0].reason
    return seconds[True] / seconds[False], reason


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
    parser.add_argument("--caches", action="store_true", help="every cache with nothing to skip, one line each")
    options = parser.parse_args()
    settings = options.model, options.rounds, options.steps
    for row in measure_idle(*settings) if options.caches else [measure_overhead(*settings)]:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
