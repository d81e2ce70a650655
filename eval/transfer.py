"""What a tuned schedule keeps on other prompts and at other numbers of steps.

`python -m diffeff.eval.transfer` tunes a schedule on four prompts at the model's own number of steps and prints JSON
lines: its PSNR to plain there and on prompts and seeds it never saw (the loss is the difference of the means), and at
other numbers of steps beside a schedule of as many branches tuned there (on prompts neither saw). No times are taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffeff.core.config import Config
from diffeff.eval.bench.stamp import run_stamp
from diffeff.eval.metrics.result import bootstrap_mean
from diffeff.eval.prompts import load_prompts
from diffeff.methods.tokens.unpad_text import UnpadText
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.search.bench import decibels_of
from diffeff.search.choose import corrected
from diffeff.search.schedule import Schedule
from diffeff.search.schedules import ScheduleSearch
from diffeff.search.sensitivity import sensitivities
from diffeff.search.trace import Job, record
from diffeff.zoo import bundled

__all__ = ["Setting", "measure", "tuned"]

ELSEWHERE = (20, 50)
TUNED_ON, FRESH = 4, 9000


@dataclass(frozen=True)
class Setting:
    """What is tuned: prompts with seeds, the pipeline's arguments, exact methods that stay on, computed branches."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, Any]
    beside: tuple[Config, ...]
    rows: int

    def at(self, steps: int) -> Setting:
        """The same at another number of steps."""
        return replace(self, call={**self.call, "num_inference_steps": steps})


def tuned(pipe: Any, setting: Setting) -> Schedule:
    """A schedule as `diffeff tune` makes it, of so many branches."""
    job = Job(setting.prompts, setting.seeds, setting.call, setting.beside)
    trace = record(pipe, job)
    search = ScheduleSearch.of(trace, sensitivities(pipe, job, trace, 4))
    return corrected(pipe, job, trace, search, setting.rows)


def measure(pipe: Any, setting: Setting, schedule: Schedule, prompts: Sequence[str], seed: int) -> list[float]:
    """PSNR to plain, in dB, of each prompt (four at a time), at seeds `seed` and on."""
    plans = Plan(setting.beside), Plan([*setting.beside, schedule.config()])
    found: list[float] = []
    for start in range(0, len(prompts), 4):
        rows = list(prompts[start : start + 4])
        pairs = [_frames(pipe, plan, setting.call, rows, seed + start) for plan in plans]
        found += [decibels_of(plain, other) for plain, other in zip(*pairs, strict=True)]
    pipe.remove()
    return found


def _frames(pipe: Any, plan: Plan, call: Mapping[str, Any], prompts: list[str], seed: int) -> np.ndarray[Any, Any]:
    pipe.apply(plan)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    output = pipe(prompt=prompts, generator=generators, output_type="np", **call)
    return np.asarray(getattr(output, "frames", None) if hasattr(output, "frames") else output.images)


def _rows(pipe: Any, here: Setting, others: Sequence[str], few: Sequence[str]) -> Iterator[dict[str, Any]]:
    schedule = tuned(pipe, here)
    own = [measure(pipe, here, schedule, [p], s)[0] for p, s in zip(here.prompts, here.seeds, strict=True)]
    fresh = measure(pipe, here, schedule, others, FRESH)
    loss = float(np.mean(own) - np.mean(fresh))
    yield {"to": f"{len(others)} other prompts", "tuned_on": _summary(own), "there": _summary(fresh), "loss": loss}
    for steps in ELSEWHERE:
        there = here.at(steps)
        native = measure(pipe, there, tuned(pipe, there), few, FRESH)
        carried = measure(pipe, there, schedule, few, FRESH)
        loss = float(np.mean(native) - np.mean(carried))
        yield {"to": f"{steps} steps", "tuned_there": _summary(native), "there": _summary(carried), "loss": loss}


def _summary(values: Sequence[float]) -> dict[str, float]:
    interval = bootstrap_mean(np.array(values))
    return {
        "psnr": float(np.mean(values)),
        "low": interval.low,
        "high": interval.high,
        "worst": min(values),
        "prompts": len(values),
    }


def main() -> None:
    """Print one row per question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sprites-wan")
    parser.add_argument("--branches", type=int, default=10, help="denoiser calls per run, branches counted apart")
    parser.add_argument("--prompts", type=int, default=64, help="how many it never saw")
    parser.add_argument("--elsewhere", type=int, default=16, help="how many at other numbers of steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = DiffEffPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    texts = [prompt.text for prompt in load_prompts("sprites", TUNED_ON + options.prompts).prompts]
    beside = (UnpadText(),) if options.model == "sprites-wan" else ()
    call = bundled.recommended(options.model).call_options()
    here = Setting(tuple(texts[:TUNED_ON]), tuple(range(TUNED_ON)), call, beside, options.branches)
    others = texts[TUNED_ON:]
    head = {"benchmark": "transfer", "model": options.model, "branches": options.branches, "call": dict(call)}
    stamp = run_stamp() | {"environment": environment()}
    for row in _rows(pipe, here, others, others[: options.elsewhere]):
        sys.stdout.write(json.dumps({**head, **row, **stamp}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
