"""Do the `sprites` features mean something? Three measurements, one JSON line each, and a figure of them.

`python -m diffeff.eval.features_check` spoils clips of the bundled world by growing amounts and swaps words of their
captions; with `--checkpoints DIR` it also ranks snapshots of a training run, which `--train-checkpoints MINUTES`
makes. What is measured is clips against other clips of the same captions, none of which the encoder was trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffeff.errors import ConfigError
from diffeff.eval.features.sprites import SpritesFeatures
from diffeff.eval.features_figure import draw
from diffeff.eval.metrics.frechet import frechet
from diffeff.eval.metrics.kernel import kid
from diffeff.report import environment
from diffeff.zoo.degrade import FRAME_KINDS, MOST, degrade
from diffeff.zoo.world import ATTRIBUTES, HELD_OUT, Scene, render

__all__ = ["LEVELS", "Level", "Reference", "check_captions", "check_checkpoints", "check_degradation", "held_out"]

Rows = NDArray[np.floating[Any]]

RESULTS = Path("eval/results/features.jsonl")
IMAGE = Path("docs/images/features-check.png")
#: Snapshots of the short run: about as many steps again each time.
KEEP = (30, 60, 120, 240, 400)
DISTANCES = ("frechet", "kernel")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Level:
    """A way to spoil clips, how much (in `unit`), and whether the encoder met it in training."""

    unit: str
    amounts: tuple[float, ...]
    trained_on: bool = True


_EIGHTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
LEVELS: Mapping[str, Level] = {
    "noise": Level("standard deviation, of white", (0.0, 0.02, 0.05, 0.1, 0.2, 0.35)),
    "blur": Level("sigma in pixels of 64", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)),
    "repeat": Level("share of frames, the last one repeated", _EIGHTHS),
    "shuffle": Level("disorder of the frames", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "texture": Level("standard deviation of a static pattern", (0.0, 0.02, 0.05, 0.1, 0.175, 0.25)),
    "flicker": Level("standard deviation of changing light", (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)),
    "warp": Level("bend in pixels of 64", (0.0, 0.5, 1.0, 2.0, 3.5, 5.0)),
    "fade": Level("contrast lost", (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)),
    "ghost": Level("share of another clip", (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)),
    "mosaic": Level("share of 8x8 blocks", (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)),
    "blotches": Level("standard deviation of coloured spots", (0.0, 0.02, 0.05, 0.1, 0.2, 0.35)),
    "scatter": Level("share of cells out of place", (0.0, 0.02, 0.05, 0.1, 0.3, 0.6)),
    "jpeg": Level("100 - quality", (0.0, 20.0, 50.0, 75.0, 90.0, 95.0), trained_on=False),
}


def held_out(count: int, seed: int, frames: int = 9) -> Tensor:
    """Clips uint8 [N, F, 3, 64, 64] of the first `count` captions that nothing was trained on."""
    clips = render(HELD_OUT[:count], frames=frames, generator=torch.Generator().manual_seed(seed))
    return as_bytes(clips)


def as_bytes(clips: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8."""
    return (clips * 255).round().clamp(0, 255).to(torch.uint8)


def spoil(clips: Tensor, kind: str, amount: float, seed: int) -> Tensor:
    """uint8 clips spoilt by `amount` in the unit of LEVELS; the same draw for every amount."""
    if amount == 0:
        return clips
    if kind == "jpeg":
        return _jpeg(clips, round(100 - amount))
    generator = torch.Generator().manual_seed(seed)
    return as_bytes(degrade(clips.float() / 255, kind, amount / MOST[kind], generator))


def _jpeg(clips: Tensor, quality: int) -> Tensor:
    from PIL import Image

    def through(frame: Tensor) -> Tensor:
        buffer = io.BytesIO()
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)

    return torch.stack([through(frame) for frame in clips.flatten(0, 1)]).view(clips.shape)


class Reference:
    """Features of real clips, to measure others against."""

    def __init__(self, source: SpritesFeatures, clips: Tensor) -> None:
        self.source = source
        self.frames, self.clips = source.images(one_frame_each(clips)).numpy(), source.clips(clips).numpy()

    def distances(self, clips: Tensor) -> dict[str, dict[str, Any]]:
        """Fréchet and kernel distance of uint8 clips: of one frame of each, and of the clips."""
        frames = self.source.images(one_frame_each(clips)).numpy()
        sides = {"frames": (self.frames, frames), "clips": (self.clips, self.source.clips(clips).numpy())}
        return {what: _measured(*pair) for what, pair in sides.items()}


def _measured(reference: Rows, subject: Rows) -> dict[str, Any]:
    """Both distances, each with its 95 % interval."""
    found = {"frechet": frechet(reference, subject), "kernel": kid(reference, subject)}
    values: dict[str, Any] = {name: result.value for name, result in found.items()}
    spread = {name: result.interval for name, result in found.items()}
    return values | {f"{name}_interval": [i.low, i.high] if i else None for name, i in spread.items()}


def one_frame_each(clips: Tensor) -> Tensor:
    """Frame i mod F of clip i: [N, 3, H, W]."""
    return clips[torch.arange(len(clips)), torch.arange(len(clips)) % clips.shape[1]]


def check_degradation(reference: Reference, clips: Tensor, kind: str, seed: int = 0) -> dict[str, Any]:
    """How the distances to real clips rise as other real clips are spoilt more and more."""
    level = LEVELS[kind]
    seen = [reference.distances(spoil(clips, kind, amount, seed)) for amount in level.amounts]
    shown = ("frames", "clips") if kind in (*FRAME_KINDS, "jpeg") else ("clips",)
    curves = _curves(seen, shown)
    return {
        "check": "degradation",
        "kind": kind,
        "unit": level.unit,
        "amounts": list(level.amounts),
        "trained_on": level.trained_on,
        "n": len(clips),
        **curves,
        "rises": {what: {name: rises(curves[what][name]) for name in DISTANCES} for what in shown},
    }


def _curves(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Of each kind of feature each number as a list over `rows`."""
    return {what: {name: [row[what][name] for row in rows] for name in rows[0][what]} for what in shown}


def rises(values: Sequence[float]) -> bool:
    """Strictly, from each value to the next."""
    return all(a < b for a, b in pairwise(values))


def check_captions(
    source: SpritesFeatures, clips: Tensor, scenes: Sequence[Scene], attribute: str, seed: int = 0
) -> dict[str, Any]:
    """How the text score falls as more and more clips are given a caption with one attribute wrong.

    `separated` is how often a clip's own caption scores above the one with the wrong word.
    """
    random = np.random.default_rng(seed)
    own = _scores(source, clips, [scene.caption for scene in scenes])
    wrong = _scores(source, clips, [_misread(scene, attribute, random).caption for scene in scenes])
    order = random.permutation(len(scenes))
    cut = [round(share * len(scenes)) for share in SHARES]
    means = [float(np.concatenate((wrong[order[:k]], own[order[k:]])).mean()) for k in cut]
    return {
        "check": "captions",
        "attribute": attribute,
        "shares": list(SHARES),
        "score": means,
        "falls": rises(means[::-1]),
        "separated": float((own > wrong).mean()),
        "n": len(scenes),
    }


def _misread(scene: Scene, attribute: str, random: np.random.Generator) -> Scene:
    others = [word for word in ATTRIBUTES[attribute] if word != getattr(scene, attribute)]
    return replace(scene, **{attribute: others[int(random.integers(len(others)))]})


def _scores(source: SpritesFeatures, clips: Tensor, captions: Sequence[str]) -> Rows:
    """Text scores of clips, one each."""
    cosines = cosine_similarity(source.embed_clips(clips).double(), source.embed_texts(captions).double())
    return source.text_scale * cosines.clamp(min=0).numpy()


def check_checkpoints(
    reference: Reference, folder: Path, *, count: int = 200, steps: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Distances to real clips of what each snapshot `step-*.pt` of a sprites-wan training run makes.

    Beside them stands how many clips follow their caption, read from the pixels by no network at all. Raises
    ConfigError for fewer than two snapshots.
    """
    from diffeff.zoo.score import score_clips
    from diffeff.zoo.train.wan_export import sample

    paths = sorted(folder.glob("step-*.pt"))
    if len(paths) < 2:
        raise ConfigError(f"{folder} holds {len(paths)} snapshots step-*.pt: two or more can be ranked")
    scenes, rows = list(HELD_OUT[:count]), []
    for path in paths:
        clips = sample(_pipeline(path), scenes, steps=steps, seed=seed)
        scores = score_clips(scenes, clips)
        made = as_bytes(clips)
        text = _scores(reference.source, made, [s.caption for s in scenes])
        adherence = {name: a.accuracy for name, a in {**scores.attributes, "all": scores.everything}.items()}
        rows.append({**reference.distances(made), "score": float(text.mean()), "adherence": adherence})
    return _ranked([int(path.stem.split("-")[1]) for path in paths], rows) | {"n": count, "sampling_steps": steps}


def _ranked(steps: list[int], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = _curves(rows, ("frames", "clips"))
    score = [row["score"] for row in rows]
    return {
        "check": "checkpoints",
        "model": "sprites-wan",
        "steps": steps,
        **curves,
        "score": score,
        "adherence": {name: [row["adherence"][name] for row in rows] for name in rows[0]["adherence"]},
        "in_order": {
            **{what: {name: rises(curves[what][name][::-1]) for name in DISTANCES} for what in curves},
            "score": rises(score),
        },
    }


def _pipeline(path: Path) -> Any:
    """The bundled pipeline with the text encoder and transformer of a snapshot."""
    from diffeff.zoo import bundled
    from diffeff.zoo.train.wan_export import build_pipeline
    from diffeff.zoo.train.wan_model import Joint

    pipe: Any = bundled.load("sprites-wan")
    joint = Joint(pipe.text_encoder, pipe.transformer)
    joint.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return build_pipeline(pipe.tokenizer, joint.eval(), pipe.vae)


def train_checkpoints(folder: Path, minutes: float, keep: Sequence[int], seed: int = 11) -> None:
    """A short training run of sprites-wan with the bundled autoencoder, snapshots after each of `keep` steps."""
    from diffeff.zoo import bundled
    from diffeff.zoo.train.harness import TrainOptions
    from diffeff.zoo.train.wan import VAE_SHARE, train_joint

    pipe: Any = bundled.load("sprites-wan")
    budget, device = minutes / (1 - VAE_SHARE), torch.device("cpu")
    options = TrainOptions(name="sprites-wan", out=folder, work=folder, minutes=budget, device=device, seed=seed)
    train_joint(options, pipe.vae.eval().requires_grad_(False), keep)


def _append(path: Path, source: SpritesFeatures, seed: int, row: Mapping[str, Any]) -> dict[str, Any]:
    whole = {
        "benchmark": "features",
        "version": 1,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **row,
        "seed": seed,
        "features": source.describe(),
        "environment": environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_rounded(whole)) + "\n")
    return whole


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def measure_all(
    out: Path, *, count: int, seed: int, checkpoints: Path | None, observe: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every check, each appended to `out` as soon as it is done."""
    source = SpritesFeatures()
    reference, clips = Reference(source, held_out(count, seed + 1)), held_out(count, seed + 2)
    jobs: list[Callable[[], dict[str, Any]]] = [
        *(lambda kind=kind: check_degradation(reference, clips, kind, seed) for kind in LEVELS),
        *(lambda name=name: check_captions(source, clips, HELD_OUT[:count], name, seed) for name in ATTRIBUTES),
    ]
    if checkpoints is not None:
        jobs.append(lambda: check_checkpoints(reference, checkpoints, count=count, seed=seed))
    rows = []
    for job in jobs:
        rows.append(_append(out, source, seed, job()))
        observe(summary(rows[-1]))
    return rows


def summary(row: Mapping[str, Any]) -> str:
    """One line for a reader."""
    what = row.get("kind") or row.get("attribute") or row["model"]
    verdict = row.get("rises") or row.get("in_order") or {"falls": row.get("falls"), "separated": row.get("separated")}
    return f"{row['check']} {what}: {json.dumps(verdict)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m diffeff.eval.features_check", description=__doc__)
    parser.add_argument("--count", type=int, default=len(HELD_OUT), help="clips on each side (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended here")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where the figure goes")
    parser.add_argument("--checkpoints", type=Path, help="folder of snapshots step-*.pt to rank")
    parser.add_argument("--train-checkpoints", type=float, metavar="MINUTES", help="train them into that folder first")
    args = parser.parse_args(argv)
    if args.train_checkpoints and args.checkpoints is None:
        parser.error("--train-checkpoints needs --checkpoints DIR")
    if args.train_checkpoints:
        train_checkpoints(args.checkpoints, args.train_checkpoints, KEEP)
    rows = measure_all(args.out, count=args.count, seed=args.seed, checkpoints=args.checkpoints, observe=_say)
    draw(rows, args.image)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
