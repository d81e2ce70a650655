"""Speed, fidelity and adherence of plans over many held-out captions, beside plain runs of fewer steps.

`python -m diffeff.eval.trade --model sprites-wan --plans high,balanced,fast --fewer 15,12,10` appends one JSON line per
arm to a file under `eval/results/`. Every arm runs each prompt at the same seed as plain; the arms take turns prompt by
prompt in one process, so a busy machine slows all of them alike. A speed-up is the median over prompts of that
prompt's ratio to plain; PSNR is the mean over prompts, against plain at the model's recommended steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffeff.eval.metrics.fidelity import psnr
from diffeff.files import write_text
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.zoo import bundled
from diffeff.zoo.score import score_clips
from diffeff.zoo.world import HELD_OUT, Scene

__all__ = ["Arm", "append", "measure_trade", "render"]

Frames = NDArray[np.float32]


@dataclass
class Arm:
    """One way to make the clips: a plan at the recommended steps, or plain with fewer steps."""

    name: str
    plan: Plan
    steps: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)
    clips: list[Frames] = field(default_factory=list)
    computed: float = 1.0


def measure_trade(
    model: str,
    plans: Sequence[tuple[str, Plan]],
    fewer: Sequence[int],
    *,
    prompts: int = 50,
    seed: int = 0,
    steps: int | None = None,
    observe: Any = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One JSON-ready row per arm, plain first. `prompts` held-out captions, one seed each."""
    pipe = DiffEffPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    best = bundled.recommended(model).call_options()
    full: int = steps or best["num_inference_steps"]
    options = {k: v for k, v in best.items() if k != "num_inference_steps"}
    arms = [Arm("plain", Plan(), full), *(Arm(name, plan, full) for name, plan in plans)]
    arms += [Arm(f"plain, {n} steps", Plan(), n) for n in fewer]
    scenes = _scenes(prompts)
    for arm in arms:  # warm-up
        _run(pipe, arm, scenes[0], seed, options)
    for number, scene in enumerate(scenes):
        order = arms if number % 2 else arms[::-1]
        for arm in order:
            clip, wall, cpu = _run(pipe, arm, scene, seed + number, options)
            arm.seconds.append(wall)
            arm.cpu.append(cpu)
            arm.clips.append(clip)
        for arm in arms:
            arm.psnrs.append(psnr(arms[0].clips[-1], arm.clips[-1]))
        observe(number + 1, len(scenes))
    return [_row(model, arm, arms[0], scenes, seed, options) for arm in arms]


def _scenes(count: int) -> list[Scene]:
    spread = torch.randperm(len(HELD_OUT), generator=torch.Generator().manual_seed(0))[:count]
    return [HELD_OUT[int(i)] for i in spread]


def _run(
    pipe: DiffEffPipeline, arm: Arm, scene: Scene, seed: int, options: dict[str, Any]
) -> tuple[Frames, float, float]:
    if arm.plan.methods:
        pipe.apply(arm.plan)
    else:
        pipe.remove()
    generator = torch.Generator().manual_seed(seed)
    start, start_cpu = time.perf_counter(), time.process_time()
    out = pipe(
        prompt=scene.caption,
        num_inference_steps=arm.steps,
        generator=generator,
        output_type="np",
        return_dict=False,
        **options,
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    if arm.plan.methods and pipe.report is not None:
        shares = pipe.report.blocks.values()
        arm.computed = sum(s.computed for s in shares) / sum(s.total for s in shares)
    frames = np.asarray(out[0][0], dtype=np.float32)
    return (frames if frames.ndim == 4 else frames[None]), wall, cpu


def _row(model: str, arm: Arm, plain: Arm, scenes: list[Scene], seed: int, options: dict[str, Any]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(plain.seconds, arm.seconds, strict=True)]
    cpu_ratios = [a / b for a, b in zip(plain.cpu, arm.cpu, strict=True)]
    clips = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in arm.clips]
    scores = score_clips(scenes, [clip[0] if len(clip) == 1 else clip for clip in clips])
    finite = [p for p in arm.psnrs if np.isfinite(p)]
    return {
        "benchmark": "trade",
        "model": model,
        "arm": arm.name,
        "plan": arm.plan.to_dict() if arm.plan.methods else None,
        "steps": arm.steps,
        "options": options,
        "prompts": len(scenes),
        "seed": seed,
        "speedup": _quartiles(ratios),
        "cpu_speedup": _quartiles(cpu_ratios),
        "seconds": _quartiles(arm.seconds),
        "blocks_computed": round(arm.computed, 4) if arm.plan.methods else round(arm.steps / plain.steps, 4),
        "psnr": None if not finite else {"mean": round(float(np.mean(finite)), 2), "min": round(min(finite), 2)},
        "identical": not finite,
        "adherence": scores.to_json()["accuracy"],
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def append(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Add rows to a JSON-lines file, whole or not at all."""
    before = path.read_text("utf-8") if path.exists() else ""
    return write_text(path, before + "".join(json.dumps(row) + "\n" for row in rows))


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows of one model."""
    names = [name for name in ("colour", "shape", "motion", "camera") if name in rows[0]["adherence"]]
    head = ["arm", "speed-up (quartiles)", "PSNR to plain", "blocks computed", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        speed, psnrs = row["speedup"], row["psnr"]
        cells = [
            row["arm"],
            f"{speed['median']:.2f} ({speed['q1']:.2f} to {speed['q3']:.2f})",
            "identical" if psnrs is None else f"{psnrs['mean']:.1f} dB (worst {psnrs['min']:.1f})",
            f"{100 * row['blocks_computed']:.0f} %",
            *(_interval(row["adherence"][name]) for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(accuracy: dict[str, Any]) -> str:
    low, high = accuracy["interval95"]
    return f"{100 * accuracy['accuracy']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-wan", help="bundled sprites model (default: sprites-wan)")
    parser.add_argument("--plans", default="high,balanced,fast", help="presets or plan files, comma-separated")
    parser.add_argument("--fewer", default="15,12,10,8", help="numbers of plain steps to compare with")
    parser.add_argument("--prompts", type=int, default=50, help="held-out captions (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt; the next take the next")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: print only the table)")
    return parser.parse_args()


def main() -> None:
    """Command line of the benchmark."""
    options = _options()
    plans = [(name, Plan.of(name)) for name in options.plans.split(",") if name]
    fewer = [int(n) for n in options.fewer.split(",") if n]

    def observe(done: int, total: int) -> None:
        sys.stderr.write(f"\r{done} of {total} prompts")

    rows = measure_trade(options.model, plans, fewer, prompts=options.prompts, seed=options.seed, observe=observe)
    if options.out is not None:
        append(options.out, rows)
    sys.stdout.write("\n" + render(rows) + "\n")


if __name__ == "__main__":
    main()
