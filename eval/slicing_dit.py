"""Activation memory and time of a sliced video transformer against the plain one, at real widths.

`python -m diffeff.eval.slicing_dit` appends JSON lines to `eval/results/slicing.jsonl`: one per arm and measure.

* `live`: peak bytes of tensors alive at once above weights and inputs during one call of one block of Wan 2.1 1.3B (81
  frames at 480p: 32,760 tokens), traced without any memory; and of a forward of the whole transformer with `--layers`.
* `seconds` (`--rounds N`): process-CPU time of one block at the reduced `--timed` grid, both arms in turn in every
  round; ratio to plain, and how far the outputs are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffeff.eval.bench.stamp import run_stamp
from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit import slice_dit
from diffeff.methods.memory.live import live_activations
from diffeff.report import environment

__all__ = ["Grid", "live_rows", "timed_rows"]

RESULTS = Path(__file__).parent / "results" / "slicing.jsonl"
_WIDTHS = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}


@dataclass(frozen=True)
class Grid:
    """Tokens of one video behind the patch embedding."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Grid:
        """From `21x30x52`."""
        frames, height, width = (int(part) for part in text.split("x"))
        return cls(frames, height, width)

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


def _model(layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel(**_WIDTHS, num_layers=layers)
    return model.eval()


def _block_call(model: Any, grid: Grid, dtype: torch.dtype) -> tuple[Any, ...]:
    width = model.config.num_attention_heads * model.config.attention_head_dim
    latents = torch.empty(1, 16, grid.frames, 2 * grid.height, 2 * grid.width)
    hidden, text = torch.randn(1, grid.tokens, width, dtype=dtype), torch.randn(1, 512, width, dtype=dtype)
    return hidden, text, torch.randn(1, 6, width), model.rope(latents)


def _model_call(model: Any, grid: Grid, dtype: torch.dtype) -> tuple[Any, ...]:
    latents = torch.randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width, dtype=dtype)
    return latents, torch.zeros(1), torch.randn(1, 512, model.config.text_dim, dtype=dtype)


# --- measures -----------------------------------------------------------------------------------------------------
def live_rows(grid: Grid, dtype: torch.dtype, layers: int, slices: int | None) -> Iterator[dict[str, Any]]:
    """Peak of live activations, plain and sliced: of one block when `layers` is 0, else of a whole transformer."""
    plain = None
    for arm in ("plain", "feature_slicing"):
        with FakeTensorMode(), torch.no_grad():
            model = _typed(dtype, max(layers, 1))
            call = _model_call(model, grid, dtype) if layers else _block_call(model, grid, dtype)
            if arm != "plain":
                slice_dit(model, Share(None, slices))
            target = model if layers else model.blocks[0]
            with live_activations() as live:
                target(*call)
        plain = plain or live.peak
        yield {"arm": arm, "live_peak_bytes": live.peak, "at": live.at, "ratio": round(plain / live.peak, 3)}


def _typed(dtype: torch.dtype, layers: int) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake weights cannot be cast in place
    try:
        return _model(layers)
    finally:
        torch.set_default_dtype(before)


def timed_rows(grid: Grid, rounds: int, slices: int | None) -> Iterator[dict[str, Any]]:
    """Process-CPU seconds of `rounds` calls of one block, plain and sliced in turn; the first round warms up."""
    torch.manual_seed(0)
    arms = ("plain", "feature_slicing")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        model = _model(1)
        call = _block_call(model, grid, torch.float32)
        for number in range(rounds + 1):
            for arm in arms if number % 2 else arms[::-1]:
                taken, outputs[arm] = _timed(model, call, arm, slices)
                seconds[arm] += [taken] if number else []
    ratios = [a / b for a, b in zip(seconds["feature_slicing"], seconds["plain"], strict=True)]
    error = float((outputs["feature_slicing"] - outputs["plain"]).norm() / outputs["plain"].norm())
    for arm in arms:
        yield {"arm": arm, "rounds": rounds, "seconds_median": round(statistics.median(seconds[arm]), 4)} | (
            {} if arm == "plain" else {**_spread(ratios), "error": error}
        )


def _spread(ratios: list[float]) -> dict[str, float]:
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return {"ratio_median": round(middle, 4), "ratio_min": round(low, 4), "ratio_max": round(high, 4)}


def _timed(model: Any, call: tuple[Any, ...], arm: str, slices: int | None) -> tuple[float, Tensor]:
    with ExitStack() as stack:
        if arm != "plain":
            stack.callback(slice_dit(model, Share(None, slices)))
        start = time.process_time()
        out = model.blocks[0](*call)
        return time.process_time() - start, out


# --- command ------------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="21x30x52", help="tokens traced: frames x rows x columns")
    parser.add_argument("--timed", default="5x20x32", help="tokens timed")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--layers", default="0,2", help="0: one block alone; N: a transformer of N blocks")
    parser.add_argument("--slices", type=int, default=0, help="force this many slices (default: by size)")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of timed calls (default: none)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended here")
    options = parser.parse_args(arguments)
    slices = options.slices or None
    facts = {"benchmark": "slicing", "model": "wan-1.3b", "slices": slices}
    stamp = {**run_stamp(), "device": "cpu", "threads": torch.get_num_threads(), "environment": environment()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in _rows(options, slices):
        line = json.dumps({**facts, **row, **stamp}) + "\n"
        with options.out.open("a") as file:
            file.write(line)
        sys.stdout.write(line)


def _rows(options: argparse.Namespace, slices: int | None) -> Iterator[dict[str, Any]]:
    for dtype in options.dtypes.split(","):
        for layers in map(int, options.layers.split(",")):
            named = {"measure": "live", "grid": options.grid, "dtype": dtype, "layers": layers}
            for row in live_rows(Grid.parse(options.grid), getattr(torch, dtype), layers, slices):
                yield named | row
    if options.rounds:
        for row in timed_rows(Grid.parse(options.timed), options.rounds, slices):
            yield {"measure": "seconds", "grid": options.timed, "dtype": "float32", "layers": 0} | row


if __name__ == "__main__":
    main()
