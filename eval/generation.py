"""Clips of a model for a list of prompts, made once: plain and under a plan, at the same seeds, resumable.

Every clip is written losslessly as 8-bit pixels, with its final latents beside it where the pipeline hands them out.
A killed run leaves whole files only; the next one makes what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from diffeff.errors import DiffEffError, UnsupportedModel
from diffeff.eval.append_log import AppendLog, code_digest, digest
from diffeff.eval.calls import clips_of, fingerprint, options_of, parameters, subject_of
from diffeff.eval.items import item_sha
from diffeff.eval.settings import CallSettings
from diffeff.files import replacing, write_text
from diffeff.media import to_bytes, write_lossless
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.stamp import stamp_of

if TYPE_CHECKING:
    from diffeff.eval.engine import Engine
    from diffeff.pipeline import DiffEffPipeline

__all__ = ["Arm", "Generator", "Made", "Recipe", "Shot", "arm_of", "describe", "make"]

_VERSION = 1  # raised when the same settings would give other files
_CODE = ("diffeff.anatomy", "diffeff.core", "diffeff.methods", "diffeff.kernels")
"""What decides how a plan runs: clips of other code are made anew."""
Clip32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shot:
    """One clip to make."""

    name: str
    prompt: str
    seed: int

    @classmethod
    def of(cls, prompt: str, seed: int) -> Shot:
        """Named after its seed and its prompt, so that a longer list of prompts finds what a shorter one made."""
        return cls(f"{seed:06d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}", prompt, seed)


@dataclass(frozen=True)
class Recipe:
    """How a pipeline is loaded and called; builds the worker that does it. Picklable, for workers elsewhere."""

    model: str
    call: CallSettings
    device: str
    dtype: str

    def __call__(self) -> Generator:
        """Load the model. Raises ModelLoadError, UnknownName, or ConfigError for an option it does not take."""
        from diffeff.pipeline import DiffEffPipeline

        pipe = DiffEffPipeline.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return Generator(pipe, options_of(self.model, self.call, pipe.wrapped))


@dataclass(frozen=True)
class Arm:
    """The clips of one plan: a folder of its own, and what is called there in reports."""

    name: str
    plan: Plan
    folder: Path


@dataclass(frozen=True)
class Made:
    """One clip that is there. `latents` is None where the pipeline does not hand them out."""

    name: str
    path: Path
    sha256: str
    prompt: str
    seed: int
    latents: Path | None
    broken: bool = False
    """Whether the model gave pixels that are not numbers; they are stored black."""


class Generator:
    """A loaded pipeline that makes shots. Called with an arm and shots, it writes their files and says what it made."""

    def __init__(self, pipe: DiffEffPipeline, options: Mapping[str, Any]) -> None:
        self.pipe, self.options = pipe, dict(options)
        self._plan: Plan | None = None

    def describe(self, dtype: str, plans: Sequence[Plan]) -> dict[str, Any]:
        """What decides every clip of this pipeline, plan, prompt and seed aside.

        Puts each of the plans on once: one that does not fit is refused here, and not after hours of plain clips.
        """
        for plan in (*plans, Plan()):
            self._put_on(plan)
        wrapped = self.pipe.wrapped
        call = {k: v for k, v in self.options.items() if k != "output_type"}
        device = torch.device(wrapped._execution_device).type
        facts = {"pipeline": type(wrapped).__name__, **self._model(), "weights": fingerprint(wrapped)}
        return {**facts, "call": call, "device": device, "dtype": dtype}

    def _model(self) -> dict[str, Any]:
        """The family and fingerprint that plans know the model by, and its scheduler with a digest of its settings."""
        scheduler = self.pipe.wrapped.scheduler
        facts = {"scheduler": type(scheduler).__name__, "scheduler_config": digest(dict(scheduler.config))}
        try:
            stamp = stamp_of(self.pipe.wrapped, self.pipe.denoisers)
        except UnsupportedModel:  # plain generation needs no description of the model
            return {"family": None, "fingerprint": None, **facts}
        return {"family": stamp.family, "fingerprint": stamp.fingerprint, **facts}

    def __call__(self, task: tuple[Arm, Sequence[Shot]]) -> list[Made]:
        """Make one batch of shots, all of it or none."""
        arm, shots = task
        self._put_on(arm.plan)
        clips, latents = self._run(shots)
        return [
            _keep(arm.folder, shot, clip, None if latents is None else latents[i])
            for i, (shot, clip) in enumerate(zip(shots, clips, strict=True))
        ]

    def _put_on(self, plan: Plan) -> None:
        if plan != self._plan:
            self.pipe.apply(plan) if plan.methods else self.pipe.remove()
            self._plan = plan

    def _run(self, shots: Sequence[Shot]) -> tuple[list[Clip32], Tensor | None]:
        """The clips of a batch, and their final latents `[B, ...]` where the pipeline hands them out."""
        noise = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]  # the same on every device
        seen: dict[str, Tensor] = {}
        more: dict[str, Any] = {"generator": noise if len(shots) > 1 else noise[0]}
        if "callback_on_step_end" in parameters(self.pipe.wrapped):
            more["callback_on_step_end"] = _Latents(seen)
        try:
            output = self.pipe(**self.options, **subject_of(self.pipe.wrapped, [shot.prompt for shot in shots]), **more)
        except (ValueError, TypeError) as error:
            if isinstance(error, DiffEffError):
                raise
            raise DiffEffError(f"{type(self.pipe.wrapped).__name__} refused the request: {error}") from error
        return clips_of(output), seen.get("latents")


@dataclass(frozen=True)
class _Latents:
    """A callback of the pipeline's that keeps the newest latents."""

    seen: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(given.get("latents"), Tensor):
            self.seen["latents"] = given["latents"].detach()
        return given


def describe(engine: Engine, recipe: Recipe, plans: Sequence[Plan] = ()) -> dict[str, Any]:
    """What decides every clip, as a worker that has loaded the model says it: `family`, `fingerprint`, `call`, ...

    Raises what loading the model raises, and what applying one of the plans does.
    """
    return next(facts for _, facts in engine.map(_describe, [(recipe.dtype, tuple(plans))], setup=recipe))


def arm_of(name: str, plan: Plan, facts: Mapping[str, Any], work: Path) -> Arm:
    """The folder for a plan's clips: one for each set of facts that decide them."""
    versions = {k: v for k, v in environment().items() if k in ("torch", "diffusers")}
    code = {"code": code_digest(*_CODE)} if plan.methods else {}
    decides = {"version": _VERSION, "plan": plan.digest, **facts, **versions, **code}
    folder = work / "generated" / digest(decides, 16)
    settings = {**decides, "plan": plan.to_dict()}
    write_text(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
    return Arm(name, plan, folder)


def make(
    engine: Engine,
    recipe: Recipe,
    arm: Arm,
    shots: Sequence[Shot],
    batch: int = 1,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> list[Made]:
    """Every shot under the arm's plan, in the order of the shots; only what is missing is run.

    Batches are cut from the whole list of shots, so that plain and plan run identical ones and a resumed run repeats
    them. `observe(done, total)` follows. Raises what the pipeline raises; what was made before that is kept.
    """
    wanted = {shot.name for shot in shots}
    manifest = _Manifest(arm.folder)
    done = {name: made for name, made in manifest.there() if name in wanted}
    observe(len(done), len(shots))
    groups = [tuple(shots[i : i + batch]) for i in range(0, len(shots), batch)]
    missing = [(arm, group) for group in groups if any(shot.name not in done for shot in group)]
    for _, batch_made in engine.map(_call, missing, setup=recipe):
        for made in batch_made:
            manifest.add(made)
            done[made.name] = made
        observe(len(done), len(shots))
    return [done[shot.name] for shot in shots]


def _describe(generator: Generator, task: tuple[str, tuple[Plan, ...]]) -> dict[str, Any]:
    return generator.describe(*task)


def _call(generator: Generator, task: tuple[Arm, Sequence[Shot]]) -> list[Made]:
    return generator(task)


class _Manifest:
    """What a folder of clips holds: one line a clip, written when its files are whole. `open_folder` reads it, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = AppendLog(folder / "manifest.jsonl")

    def there(self) -> Iterator[tuple[str, Made]]:
        """The clips whose files are what they were when they were made."""
        for line in self._log.records:
            latents = None if line["latents"] is None else self.folder / line["latents"]
            path = self.folder / line["file_name"]
            if path.is_file() and item_sha(path) == line["sha256"] and (latents is None or latents.is_file()):
                yield (
                    line["name"],
                    Made(line["name"], path, line["sha256"], line["prompt"], line["seed"], latents, line["broken"]),
                )

    def add(self, made: Made) -> None:
        """One more clip."""
        latents = None if made.latents is None else made.latents.relative_to(self.folder).as_posix()
        line = {"name": made.name, "file_name": made.path.name, "prompt": made.prompt, "seed": made.seed}
        self._log.append(line | {"sha256": made.sha256, "latents": latents, "broken": made.broken})


def _keep(folder: Path, shot: Shot, clip: Clip32, latents: Tensor | None) -> Made:
    """Write one clip, latents first: the clip is what counts as made."""
    place = None
    if latents is not None:
        place = folder / "latents" / f"{shot.name}.safetensors"
        with replacing(place) as temporary:
            save_file({"latents": latents.detach().to("cpu", torch.float32).contiguous()}, temporary)
    path = write_lossless(folder / f"{shot.name}.png", to_bytes(clip))
    broken = not bool(np.isfinite(clip).all())
    return Made(shot.name, path, item_sha(path), shot.prompt, shot.seed, place, broken)
