"""Bundled pipelines: small, really trained, offline.

    pipe = bundled.load("sprites-sd")
    best = bundled.recommended("sprites-sd")
    image = pipe("a red circle", **best.call_options()).images[0]

Each folder under `models/` is a plain diffusers pipeline with a card (`card.json`, `README.md`) of what was
measured. A folder may instead hold an adapter and name the bundled pipeline it belongs to in `base.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffeff.errors import ModelLoadError, UnknownName, nearest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: Every bundled model.
NAMES: tuple[str, ...] = ("digits-dit", "sprites-sd", "sprites-motion", "sprites-wan")

_MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommended:
    """Settings a model was scored with: sampling steps, guidance scale, and where its pipeline takes them the
    frame size in pixels and the number of frames."""

    steps: int
    guidance: float
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    def call_options(self) -> dict[str, Any]:
        """The same as keyword arguments of the pipeline's call."""
        options = {argument: getattr(self, field) for field, argument in _ARGUMENTS.items()}
        return {argument: value for argument, value in options.items() if value is not None}


#: field of Recommended -> argument of a diffusers pipeline
_ARGUMENTS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
}


def path(name: str) -> Path:
    """The folder of a bundled model.

    Raises:
        UnknownName: `name` is not one of NAMES.
        ModelLoadError: this installation lacks its files.
    """
    if name not in NAMES:
        raise UnknownName(f"there is no bundled model {name!r}. {nearest(name, NAMES)}")
    folder = _MODELS / name
    if not (folder / "card.json").is_file():
        raise ModelLoadError(f"{folder} is missing or incomplete; `python -m diffeff.zoo.train {name}` makes it anew")
    return folder


def card(name: str) -> dict[str, Any]:
    """What is known about a model: its pipeline class, recommended settings and measured scores."""
    facts: dict[str, Any] = json.loads((path(name) / "card.json").read_text(encoding="utf-8"))
    return facts


def recommended(name: str) -> Recommended:
    """The settings on the card."""
    options = card(name)["call"]
    return Recommended(**{field: options.get(argument) for field, argument in _ARGUMENTS.items()})


def proportions(card: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every proportion on a card that was measured at the recommended settings, with its name, wherever it stands:
    entries with `right`, `trials` and `interval95`."""
    call = card.get("call", {})
    wanted = {"steps": call.get("num_inference_steps"), "guidance": call.get("guidance_scale")}
    for name, entry in _proportions(card):
        if all(entry.get(key, value) == value for key, value in wanted.items()):
            yield name, entry


def _proportions(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if {"right", "trials", "interval95"} <= value.keys():
            yield path, value
        else:
            for name, inner in value.items():
                yield from _proportions(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _proportions(inner, path)


def load(name: str, **kwargs: Any) -> DiffusionPipeline:
    """Load a bundled pipeline without touching the network; `kwargs` go to diffusers' `from_pretrained`.

    Takes under a second or two. Weights are stored in fp16 and load in fp32 unless `dtype` is given.
    """
    folder = path(name)
    if (folder / "base.json").exists():
        return _with_adapter(folder, **kwargs)
    return _pretrained(folder, **kwargs)


def _pretrained(folder: Path, **kwargs: Any) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **kwargs)
    return pipeline


def _with_adapter(folder: Path, **kwargs: Any) -> DiffusionPipeline:
    """An `AnimateDiffPipeline` from the base model's parts and the motion adapter in `folder`."""
    import diffusers

    base_name = json.loads((folder / "base.json").read_text(encoding="utf-8"))["base"]
    base = _pretrained(path(base_name), **kwargs)
    precision = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
    adapter = diffusers.MotionAdapter.from_pretrained(folder, local_files_only=True, **precision)
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    parts = {key: getattr(base, key) for key in ("vae", "text_encoder", "tokenizer", "unet")}
    pipeline: Any = diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=scheduler)
    return cast("DiffusionPipeline", pipeline)
