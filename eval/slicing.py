"""Activation memory and time of a sliced UNet against diffusers' own ways to save memory, at real widths.

`python -m diffeff.eval.slicing` appends JSON lines to `eval/results/slicing.jsonl`: one per model, latent size and arm.

* `live`: peak bytes of tensors alive at once above weights and inputs during one forward, traced without any memory.
* `rss` (`--rss`): growth of the resident set above weights during one forward, each arm in a process of its own.
* `seconds` (`--rounds N`): process-CPU time of forwards, arms in turn in every round; ratio to the plain forward.

The arms: `plain`, `feature_slicing`, `forward_chunking` (`unet.enable_forward_chunking()`), and for AnimateDiff
`split_inference` (`pipe.enable_free_noise_split_inference()`: 16 frames at once in spatial operators, which splits
nothing in a clip of 16) and `split_inference_1` (one frame at once).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffeff.eval.bench.stamp import run_stamp
from diffeff.memory import peak_memory
from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.live import live_activations
from diffeff.methods.memory.unet import slice_unet
from diffeff.methods.memory.unet_cuts import skip_bytes
from diffeff.report import environment

__all__ = ["ARMS", "Subject", "arms_of", "live_rows", "timed_rows"]

RESULTS = Path(__file__).parent / "results" / "slicing.jsonl"
_REAL = (320, 640, 1280, 1280)
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Subject:
    """One forward of a UNet with random weights: AnimateDiff, SVD or SD, `size` x `size` latents, `frames` frames
    (rows, for SD), batch 1."""

    model: str
    size: int
    frames: int = 16
    channels: tuple[int, ...] = _REAL

    def build(self) -> Any:
        """The UNet, with weights as diffusers initialises them."""
        import diffusers

        classes = {"sd": "UNet2DConditionModel", "svd": "UNetSpatioTemporalConditionModel"}
        suffixes = {"sd": "2D", "svd": "SpatioTemporal"}
        options: dict[str, Any] = {
            "block_out_channels": self.channels,
            **self._types(suffixes.get(self.model, "Motion")),
        }
        if self.model == "svd":
            options["num_attention_heads"] = tuple(c // 64 for c in self.channels)
        else:
            options["cross_attention_dim"] = 768
        unet: Any = getattr(diffusers, classes.get(self.model, "UNetMotionModel"))(**options)
        return unet.eval()

    def _types(self, suffix: str) -> dict[str, tuple[str, ...]]:
        deep = len(self.channels) - 1
        return {
            "down_block_types": (*(f"CrossAttnDownBlock{suffix}",) * deep, f"DownBlock{suffix}"),
            "up_block_types": (f"UpBlock{suffix}", *(f"CrossAttnUpBlock{suffix}",) * deep),
        }

    def call(self, unet: Any) -> dict[str, Any]:
        """The arguments of one forward."""
        n, side, width = self.frames, self.size, unet.config.cross_attention_dim
        if self.model == "svd":
            sample = torch.randn(1, n, 8, side, side)
            text, times = torch.randn(1, 1, width), torch.randn(1, 3)
            return {"sample": sample, "timestep": 500, "encoder_hidden_states": text, "added_time_ids": times}
        shape = (n, 4, side, side) if self.model == "sd" else (1, 4, n, side, side)
        return {"sample": torch.randn(*shape), "timestep": 500, "encoder_hidden_states": torch.randn(n, 77, width)}


# --- arms ---------------------------------------------------------------------------------------------------------
@contextmanager
def _plain(unet: Any, slices: int | None) -> Iterator[None]:
    yield


@contextmanager
def _feature_slicing(unet: Any, slices: int | None) -> Iterator[None]:
    undo = slice_unet(unet, Share(None, slices))
    try:
        yield
    finally:
        undo()


@contextmanager
def _forward_chunking(unet: Any, slices: int | None) -> Iterator[None]:
    modules = [m for m in unet.modules() if hasattr(m, "set_chunk_feed_forward")]
    for module in modules:
        module.set_chunk_feed_forward(chunk_size=1, dim=0)
    try:
        yield
    finally:
        for module in modules:
            module.set_chunk_feed_forward(chunk_size=None, dim=0)


@contextmanager
def _split_inference(unet: Any, slices: int | None, rows: int = 16) -> Iterator[None]:
    from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

    before = [(module, dict(module._modules)) for module in unet.modules()]
    mixin = AnimateDiffFreeNoiseMixin()
    mixin.unet = unet  # type: ignore[attr-defined]
    mixin.enable_free_noise_split_inference(spatial_split_size=256, temporal_split_size=rows)
    try:
        yield
    finally:
        for module, children in before:
            module._modules.clear()
            module._modules.update(children)


ARMS: dict[str, Callable[[Any, int | None], AbstractContextManager[None]]] = {
    "plain": _plain,
    "feature_slicing": _feature_slicing,
    "forward_chunking": _forward_chunking,
    "split_inference": _split_inference,
    "split_inference_1": partial(_split_inference, rows=1),
}


def arms_of(subject: Subject) -> list[str]:
    """The arms that exist for this model: split inference is AnimateDiff's."""
    return [arm for arm in ARMS if not arm.startswith("split_inference") or subject.model == "animatediff"]


# --- measures -----------------------------------------------------------------------------------------------------
def live_rows(subject: Subject, arms: Sequence[str], slices: int | None = None) -> Iterator[dict[str, Any]]:
    """Peak of live activations of each arm, from a trace with fake tensors."""
    with FakeTensorMode(), torch.no_grad():
        unet = subject.build()
        call = subject.call(unet)
        for arm in arms:
            with ARMS[arm](unet, slices), live_activations() as live:
                unet(**call)
            bound = skip_bytes(unet, call["sample"])
            yield {"arm": arm, "live_peak_bytes": live.peak, "at": live.at, "skip_bytes": bound}


def timed_rows(
    subject: Subject, arms: Sequence[str], rounds: int, slices: int | None = None
) -> Iterator[dict[str, Any]]:
    """Process-CPU seconds of `rounds` forwards of each arm, in turn; and how far each arm's output is from plain."""
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        unet = subject.build()
        call = subject.call(unet)
        for number in range(rounds + 1):
            for arm in arms if number % 2 else arms[::-1]:
                with ARMS[arm](unet, slices):
                    start = time.process_time()
                    outputs[arm] = unet(**call, return_dict=False)[0]
                    seconds[arm] += [time.process_time() - start] if number else []  # the first round warms up
    for arm in arms:
        yield {"arm": arm, **_timing(seconds[arm], seconds["plain"]), "error": _error(outputs[arm], outputs["plain"])}


def _timing(arm: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(arm, plain, strict=True)]
    return {
        "rounds": len(arm),
        "seconds_median": round(statistics.median(arm), 4),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }


def _error(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def _rss_row(subject: Subject, arm: str, slices: int | None) -> dict[str, Any]:
    """Growth of the resident set during one forward, in a process of its own."""
    channels = ",".join(map(str, subject.channels))
    command = [sys.executable, "-P", "-m", "diffeff.eval.slicing", "--child", arm, "--models", subject.model]
    command += ["--sizes", str(subject.size), "--frames", str(subject.frames), "--channels", channels]
    done = subprocess.run([*command, "--slices", str(slices or 0)], check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _child(subject: Subject, arm: str, slices: int | None) -> dict[str, Any]:
    with torch.no_grad():
        unet = subject.build()
        call = subject.call(unet)
        _touch(unet)
        with ARMS[arm](unet, slices):
            before = _resident()
            with peak_memory(torch.device("cpu")) as peak:
                unet(**call)
    grown = None if peak.bytes is None or before is None else peak.bytes - before
    return {"arm": arm, "rss_peak_bytes": grown, "rss_before_bytes": before}


def _touch(module: nn.Module) -> None:
    """Bring every page of the weights in, so that reading them does not count as growth."""
    for parameter in module.parameters():
        parameter.sum()


def _resident() -> int | None:
    if not _STATUS.exists():
        return None
    lines = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(next(lines).split()[1]) * 1024


# --- command ------------------------------------------------------------------------------------------------------
def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    channels = tuple(int(c) for c in options.channels.split(","))
    stamp = {**run_stamp(), "device": "cpu", "threads": torch.get_num_threads(), "environment": environment()}
    for model in options.models.split(","):
        for size in (int(s) for s in options.sizes.split(",")):
            subject = Subject(model, size, options.frames, channels)
            arms = [arm for arm in arms_of(subject) if arm in options.arms.split(",")]
            slices = options.slices or None
            facts = {"benchmark": "slicing", **asdict(subject), "dtype": "float32", "slices": slices}
            measured = {row["arm"]: row for row in live_rows(subject, arms, slices)}
            for arm in arms if options.rss else ():
                measured[arm] |= _rss_row(subject, arm, slices)
            for row in timed_rows(subject, arms, options.rounds, slices) if options.rounds else ():
                measured[row["arm"]] |= row
            yield from ({**facts, **row, **stamp} for row in measured.values())


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="animatediff,svd", help="of animatediff, svd, sd (default: the videos)")
    parser.add_argument("--sizes", default="32,64", help="sides of the latents (default: 32,64)")
    parser.add_argument("--frames", type=int, default=16, help="frames, or rows of an image model (default: 16)")
    parser.add_argument("--channels", default=",".join(map(str, _REAL)), help="widths of the levels")
    parser.add_argument("--arms", default=",".join(ARMS), help="(default: all)")
    parser.add_argument("--slices", type=int, default=0, help="force this many slices (default: by size)")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of timed forwards (default: none)")
    parser.add_argument("--rss", action="store_true", help="measure the resident set too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended here")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds and "plain" not in options.arms.split(","):
        parser.error("--rounds compares with the plain forward: leave 'plain' among the --arms")
    if options.child:
        channels = tuple(int(c) for c in options.channels.split(","))
        subject = Subject(options.models, int(options.sizes), options.frames, channels)
        sys.stdout.write(json.dumps(_child(subject, options.child, options.slices or None)) + "\n")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in _rows(options):
        line = json.dumps(row) + "\n"
        with options.out.open("a") as file:
            file.write(line)
        sys.stdout.write(line)


if __name__ == "__main__":
    main()
