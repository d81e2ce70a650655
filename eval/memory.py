"""The planner's estimate against the measured peak: a trace of live tensors, and the resident set.

`python -m diffeff.eval.memory` runs every case in a process of its own and writes a JSON line each to
eval/results/memory.jsonl. `live_ratio`: estimated over traced peak of activations and snapshots. `rss_ratio`: estimated
growth over that of the resident set (Linux), which counts scratch inside operators and what the allocator wastes; it
says nothing where the growth is small. Then one case is asked to fit a budget under its plain peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffeff.eval.bench.stamp import run_stamp
from diffeff.memory import held_bytes, peak_memory
from diffeff.methods.memory.live import live_activations
from diffeff.methods.memory.planner import MemoryGoal
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.zoo import bundled, tiny

__all__ = ["CASES", "Case", "fit", "measure"]

_CPU = torch.device("cpu")
_RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
_SMALLEST = 32_000_000
"""Growth of the resident set below which its ratio is not given: the process's own pages come and go by megabytes."""


@dataclass(frozen=True)
class Case:
    """A bundled model, or a tiny one of random weights at a size (frames, height, width) of its latents."""

    model: str
    size: tuple[int, int, int] | None = None
    methods: tuple[dict[str, Any], ...] = ()
    steps: int = 6
    options: dict[str, Any] = field(default_factory=dict)

    def pipeline(self) -> DiffEffPipeline:
        pipe: Any = bundled.load(self.model) if self.model in bundled.NAMES else tiny.make(self.model)
        pipe.set_progress_bar_config(disable=True)
        return DiffEffPipeline(pipe, Plan.from_dict({"diffeff_plan": 1, "methods": list(self.methods)}))

    def call(self, pipe: DiffEffPipeline) -> dict[str, Any]:
        """Fresh arguments."""
        if self.model in bundled.NAMES:
            what = {"class_labels": [3]} if self.model == "digits-dit" else {"prompt": "a red circle moving left"}
            made = bundled.recommended(self.model).call_options() | what | {"output_type": "np"}
            return made | {"num_inference_steps": self.steps} | self.options
        output: dict[str, Any] = {"output_type": "np"} if getattr(pipe.wrapped, "vae", None) is not None else {}
        return tiny.call_kwargs(self.model, pipe, steps=self.steps, size=self.size, **output, **self.options)


CASES: dict[str, Case] = {
    "wan bundled": Case("sprites-wan"),
    "wan bundled, cached segment": Case("sprites-wan", None, ({"use": "feature_cache", "site": "segment"},), 8),
    "sd bundled": Case("sprites-sd", None, (), 4),
    "motion bundled": Case("sprites-motion", None, (), 4),
    "dit bundled": Case("digits-dit", None, (), 4),
    "sd 96x96": Case("sd", (1, 96, 96), (), 2),
    "sd 64x64, deepcache": Case("sd", (1, 64, 64), ({"use": "deepcache"},), 6),
    "animatediff 16x40x40": Case("animatediff", (16, 40, 40), (), 2),
    "animatediff 16x40x40, sliced": Case("animatediff", (16, 40, 40), ({"use": "feature_slicing"},), 2),
    "svd 8x24x32": Case("svd", (8, 24, 32), (), 2),
    "wan image to video 5x24x32": Case("wan-i2v", (5, 24, 32), (), 2),
    "wan 9x32x48, taylorseer": Case("wan", (9, 32, 48), ({"use": "taylorseer", "first": 2},), 8),
    "cogvideox 5x48x48": Case("cogvideox", (5, 48, 48), (), 2),
    "flux 128x128, sliced": Case("flux", (1, 128, 128), ({"use": "feature_slicing"},), 2),
    "wan 9x32x48, sliced": Case("wan", (9, 32, 48), ({"use": "feature_slicing"},), 2),
}


def measure(name: str) -> dict[str, Any]:
    """Estimate and measure one case; run it in a process that has done nothing else."""
    case = CASES[name]
    pipe = case.pipeline()
    _warm_up(case, pipe)
    estimate = pipe.estimate_memory(**case.call(pipe))
    stage = estimate.stages[estimate.binding]
    growth = _resident_growth(pipe, case)
    with live_activations() as live:
        pipe(**case.call(pipe))
    expected = estimate.peak - estimate.process - sum(estimate.weights.values())
    return {
        "benchmark": "memory",
        "case": name,
        "stage": estimate.binding,
        "estimated_live": stage.activations + stage.snapshots,
        "measured_live": live.peak,
        "live_ratio": round(estimate.activations / live.peak, 4),
        "estimated_growth": expected,
        "measured_growth": growth,
        **run_stamp(),
        "rss_ratio": round(expected / growth, 3) if growth and growth > _SMALLEST else None,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _warm_up(case: Case, pipe: DiffEffPipeline) -> None:
    """Load kernels and touch weights before anything is counted, at a small size where there is a choice."""
    small = Case(case.model, None, case.methods, case.steps, case.options)
    pipe(**small.call(pipe))


def _resident_growth(pipe: DiffEffPipeline, case: Case) -> int | None:
    call = case.call(pipe)
    before = held_bytes(_CPU)
    with peak_memory(_CPU) as peak:
        pipe(**call)
    return None if peak.bytes is None or before is None else peak.bytes - before


def fit(model: str = "animatediff", share: float = 0.5) -> dict[str, Any]:
    """Ask for a budget of `share` of the plain run's growth, and measure the run that was planned for it."""
    case = Case(model, (16, 40, 40), (), 2)
    pipe = case.pipeline()
    _warm_up(case, pipe)
    plain = pipe.estimate_memory(**case.call(pipe))
    budget = plain.process + sum(plain.weights.values()) + int(share * plain.activations)
    pipe.apply(memory=MemoryGoal(memory=budget, retries=0))
    with peak_memory(_CPU) as peak:
        pipe(**case.call(pipe))
    plan = pipe.memory_plan
    chosen = None if plan is None else plan.chosen.to_dict() | {"methods": None}
    kept = peak.bytes is not None and peak.bytes <= budget
    return {"benchmark": "memory fit", "model": model, "budget": budget, "measured": peak.bytes, "kept": kept} | {
        "plain_estimate": plain.peak,
        "chosen": chosen,
        **run_stamp(),
        "environment": environment(),
    }


def _in_its_own_process(name: str) -> dict[str, Any]:
    words = [sys.executable, "-P", "-m", "diffeff.eval.memory", "--one", name]
    # Large blocks straight from the system, and back to it: else freed ones of earlier runs hide what a run takes.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=settings)
    if done.returncode:
        return {"benchmark": "memory", "case": name, "error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=[*CASES, "fit"], help="measure one case in this process and print it")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="JSON lines are added here")
    options = parser.parse_args()
    if options.one:
        row = fit() if options.one == "fit" else measure(options.one)
        sys.stdout.write(json.dumps(row) + "\n")
        return
    for name in (*CASES, "fit"):
        row = _in_its_own_process(name)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
