"""How near the schedule search comes to the best of all schedules: every one of a small run is tried.

`python -m diffeff.eval.oracle` prints one JSON line per seed and budget: the error of the schedule that the search
chose after a few real runs, over the least error of all schedules that compute as many steps. Both fill gaps alike
(fitted weights, from the recorded run), so that the ratio is about which steps are computed and nothing else. The seeds
and prompts are none that the search was developed on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb
from typing import Any

import torch

from diffeff.eval.bench.stamp import run_stamp
from diffeff.eval.prompts import load_prompts
from diffeff.methods.caching.scheduled import FITTED
from diffeff.methods.tokens.unpad_text import UnpadText
from diffeff.pipeline import DiffEffPipeline
from diffeff.report import environment
from diffeff.search.choose import choose
from diffeff.search.closed_loop import EndError
from diffeff.search.schedules import ScheduleSearch
from diffeff.search.sensitivity import sensitivities
from diffeff.search.trace import Job, Trace, record
from diffeff.zoo import bundled

__all__ = ["compare"]

STEPS = 12
BUDGETS = (4, 6, 8)
SEEDS = (6001, 6002, 6003)
MODEL = "sprites-wan"


def compare(pipe: Any, job: Job, budgets: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The search and the exhaustive best of one job without guidance, per number of computed steps.

    `errors` are relative, root mean square, of the final latents against the plain run's.
    """
    trace = record(pipe, job)
    search = ScheduleSearch.of(trace, sensitivities(pipe, job, trace, 4))
    for budget in budgets:
        target = _target(trace)
        found, error = choose(search, budget, tried := EndError(pipe, job, target))
        best, least = _oracle(search, budget, EndError(pipe, job, target))
        yield {
            "computed": budget,
            "schedules": comb(trace.steps - 1, budget - 1),
            "search": {"steps": list(found.computed), "error": error, "branches_run": tried.rows},
            "oracle": {"steps": list(best), "error": least},
            "gap": error / least - 1,
        }


def _target(trace: Trace) -> torch.Tensor:
    if trace.final is None:
        raise RuntimeError("the recorded run has no end")
    return trace.final


def _oracle(search: ScheduleSearch, budget: int, evaluate: EndError) -> tuple[tuple[int, ...], float]:
    """The best of all schedules with so many computed steps. Neighbours in this order begin alike, to save calls."""
    best: tuple[int, ...] = ()
    least = float("inf")
    for rest in combinations(range(1, search.steps), budget - 1):
        schedule = search.assemble((0, *rest), names=(FITTED,))
        error = evaluate(schedule)
        evaluate.keep(schedule)
        if error < least:
            best, least = (0, *rest), error
    return best, least


def main() -> None:
    """Print one row per seed and budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = DiffEffPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    call = bundled.recommended(MODEL).call_options() | {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    prompts = load_prompts("sprites", 200).prompts
    stamp = run_stamp() | {"environment": environment()}
    for number, seed in enumerate(SEEDS):
        job = Job((prompts[-31 - number].text,), (seed,), call, (UnpadText(),))
        for row in compare(pipe, job, BUDGETS):
            head = {"benchmark": "oracle", "model": MODEL, "steps": STEPS, "seed": seed, "prompt": job.prompts[0]}
            sys.stdout.write(json.dumps({**head, **row, "call": call, **stamp}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
