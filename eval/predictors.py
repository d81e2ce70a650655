"""How near each predictor, and each cache that treats blocks or tokens apart, stays to the plain run of a bundled
model.

`python -m diffeff.eval.predictors --prompts 8` prints one JSON line per row: PSNR of the decoded frames to the plain
run of the same seed, mean and extremes over held-out prompts. L2P's rows are fitted to four other prompts first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffeff.core.config import Config, knobs
from diffeff.eval.metrics.fidelity import psnr
from diffeff.eval.prompts import load_prompts
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.caching.published.duca import DuCa
from diffeff.methods.caching.published.fora import FORA
from diffeff.methods.caching.published.foresight import Foresight
from diffeff.methods.caching.published.l2p import L2P
from diffeff.methods.caching.published.toca import ToCa
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.search.calibration import calibrate
from diffeff.search.trace import Job
from diffeff.zoo import bundled

__all__ = ["measure", "rows"]

_FITTED_ON = 4
_LEARNED: Mapping[str, Mapping[str, Any]] = {
    "l2p": {},
    "l2p, channels": {"groups": "channels"},
    "l2p, bands": {"groups": "bands"},
    "l2p, rank 4": {"rank": 4},
}


def rows(pipe: DiffEffPipeline, job: Job, interval: int) -> dict[str, Config]:
    """What is compared, by name; learned ones fitted to `job`."""
    (spec,) = [k for k in knobs(FeatureCache) if k.name == "predictor"]
    predicted: dict[str, Config] = {
        n: FeatureCache.from_dict({"predictor": n, "interval": interval}) for n in spec.choices
    }
    indexed: dict[str, Config] = {
        f"{n}, axis=index": FeatureCache.from_dict({"predictor": n, "interval": interval, "axis": "index"})
        for n in ("linear", "quadratic", "cubic", "adams_bashforth", "bdf")
    }
    learned = {n: calibrate(pipe, job, replace(L2P(interval=interval), **more)) for n, more in _LEARNED.items()}
    parts: dict[str, Config] = {
        "fora": FORA(interval=interval),
        "toca": ToCa(interval=interval),
        "toca, random": ToCa(interval=interval, score="random"),
        "toca, attention computed": ToCa(interval=interval, attention="compute"),
        "duca": DuCa(interval=interval),
        "foresight": Foresight(),
        "foresight, 1.0": Foresight(threshold=1.0, interval=interval),
    }
    return {**predicted, **indexed, **learned, **parts}


def measure(model: str, prompts: int, interval: int, batch: int = 4) -> Iterator[dict[str, Any]]:
    """One row per predictor, on `prompts` prompts that nothing was fitted to."""
    pipe = DiffEffPipeline(bundled.load(model))
    pipe.set_progress_bar_config(disable=True)
    call = bundled.recommended(model).call_options()
    texts = load_prompts("sprites", _FITTED_ON + prompts).texts
    fitted_on = Job(tuple(texts[:_FITTED_ON]), tuple(range(_FITTED_ON)), call)
    chosen = rows(pipe, fitted_on, interval)
    plain = _frames(pipe, texts[_FITTED_ON:], call, batch)
    for name, config in chosen.items():
        pipe.apply(Plan([config]))
        frames = _frames(pipe, texts[_FITTED_ON:], call, batch)
        pipe.remove()
        found = [psnr(a, b) for a, b in zip(plain, frames, strict=True)]
        yield {"row": name, "psnr": float(np.mean(found)), "min": min(found), "max": max(found), "prompts": prompts}


def _frames(pipe: DiffEffPipeline, texts: list[str], call: Mapping[str, Any], batch: int) -> list[NDArray[np.float32]]:
    """The frames of each prompt, its seed the prompt's number above 1000."""
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        seeds = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(some))]
        out = pipe(prompt=some, generator=seeds, output_type="np", **call)
        found.extend(np.asarray(out.frames, np.float32))
    return found


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites-wan", choices=("sprites-wan", "sprites-motion"))
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts (default: 8)")
    parser.add_argument("--interval", type=int, default=3, help="every n-th step is computed (default: 3)")
    options = parser.parse_args()
    for row in measure(options.model, options.prompts, options.interval):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
