"""Small folders to evaluate: clips of the bundled world, clean or noisy, written losslessly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffeff.eval.evaluate import Evaluation, evaluate
from diffeff.eval.settings import EvalSettings
from diffeff.media import Clip, write_lossless
from diffeff.zoo.world import HELD_OUT, Scene, render

__all__ = ["PIXELS", "WORDS", "captions", "clips", "fill", "outcome", "run"]

PIXELS, WORDS = "module:eval_features:pixels", "module:eval_features:words"


def scenes(count: int) -> list[Scene]:
    return list(HELD_OUT[:count])


def captions(count: int) -> list[str]:
    return [scene.caption for scene in scenes(count)]


def clips(count: int, frames: int = 3, size: int = 32, noise: int = 0, seed: int = 0) -> list[Clip]:
    """Clips of the first captions; `noise` is the largest change of a pixel."""
    drawn = render(scenes(count), frames=frames, size=size, generator=torch.Generator().manual_seed(seed))
    pixels = (drawn.permute(0, 1, 3, 4, 2).numpy() * 255).round().astype(np.int16)
    change = np.random.default_rng(seed).integers(-noise, noise + 1, pixels.shape)
    return list((pixels + change).clip(0, 255).astype(np.uint8))


def fill(folder: Path, made: list[Clip], prompts: list[str] | None = None) -> Path:
    """Write clips as 00.png, 01.png, ...; with prompts, a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(made):
        write_lossless(folder / f"{number:02d}.png", clip)
    if prompts is not None:
        lines = [json.dumps({"file_name": f"{i:02d}.png", "prompt": p}) + "\n" for i, p in enumerate(prompts)]
        (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def run(subject: Path | str, out: Path, **settings: Any) -> Evaluation:
    """An evaluation that reports to `out/report.json`."""
    settings = {"features": (PIXELS,), **settings}
    return evaluate(EvalSettings(subject=str(subject), out=out / "report.json", **settings))


def outcome(out: Path) -> dict[str, Any]:
    """Everything of a report that must not depend on how it was made: bytes of the tables, results, samples."""
    report = json.loads((out / "report.json").read_text())
    kept = {key: report[key] for key in ("results", "gates", "notes", "prompts")}
    sides = {key: report[key] and report[key].get("sha256") for key in ("subject", "reference")}
    tables = {name: (out / name).read_bytes() for name in ("report.csv", "report.items.csv")}
    return {**kept, **sides, **tables}
