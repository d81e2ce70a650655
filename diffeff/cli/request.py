"""What `diffeff generate` is asked for, and the call of a pipeline it becomes."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffeff.errors import ConfigError, DiffEffError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffeff.pipeline import DiffEffPipeline
    from diffeff.zoo.world import Scene

__all__ = [
    "DEFAULT_MODEL",
    "DEVICES",
    "DTYPES",
    "Request",
    "call",
    "call_options",
    "is_clip",
    "parse_size",
    "placement",
    "recommended",
    "scene_of",
]

log = logging.getLogger("diffeff")
DEFAULT_MODEL = "sprites-wan"
_FILES, _SPEED = "Result and files", "Speed against plain"
DEVICES = Literal["auto", "cpu", "cuda", "mps"]
DTYPES = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Request:
    """The fields are the arguments and options of the command."""

    prompt: Annotated[str | None, typer.Argument(help="What to show.", show_default=False)] = None
    model: Annotated[
        str, typer.Option("-m", "--model", help="A bundled model (diffeff models), a folder, or a hub id.")
    ] = DEFAULT_MODEL
    plan: Annotated[str | None, typer.Option(help="A preset (lossless, high, balanced, fast) or a plan file.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's own number if left out.")] = (
        None
    )
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None
    negative: Annotated[str | None, typer.Option(help="What to keep away from.")] = None
    label: Annotated[str | None, typer.Option("--class", help="Class of a class-conditional model (digits-dit).")] = (
        None
    )
    device: Annotated[DEVICES, typer.Option(help="auto takes cuda, then mps, then cpu.")] = "auto"
    dtype: Annotated[DTYPES, typer.Option(help="auto is bfloat16 on cuda and float32 elsewhere.")] = "auto"
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write: .mp4, .gif or .png.", rich_help_panel=_FILES),
    ] = None
    fps: Annotated[int, typer.Option(min=1, max=120, help="Frames per second.", rich_help_panel=_FILES)] = 8
    enlarge: Annotated[
        int,
        typer.Option(
            min=1, max=32, help="Repeat each pixel so many times, to view tiny clips.", rich_help_panel=_FILES
        ),
    ] = 1
    json: Annotated[
        bool,
        typer.Option(
            "--json", metavar="", help="Print the report as JSON on stdout and nothing else.", rich_help_panel=_FILES
        ),
    ] = False
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            metavar="",
            help="Also run plain at the same seed; write videos, a contact sheet and a report beside the output. "
            "Without a plan or flags it takes the preset balanced.",
            rich_help_panel=_SPEED,
        ),
    ] = False
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Timed rounds of --compare.", rich_help_panel=_SPEED)] = 3


def is_clip(pipe: DiffEffPipeline) -> bool:
    """Whether the pipeline makes videos."""
    return bool({"num_frames", "video_length"} & set(_parameters(pipe)))


def call_options(request: Request, pipe: DiffEffPipeline, card: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call: what was asked for, over what the model's card recommends (`card`).

    Raises ConfigError for an option that this pipeline does not take, and without prompt or class.
    """
    takes = _parameters(pipe)
    options = {"num_inference_steps": takes["num_inference_steps"].default}
    options |= {name: value for name, value in card.items() if name in takes}
    return options | _asked(request, pipe, takes) | _subject(request, pipe, takes) | {"output_type": "np"}


def _asked(request: Request, pipe: DiffEffPipeline, takes: dict[str, Any]) -> dict[str, Any]:
    width, height = parse_size(request.size)
    values: dict[str, dict[str, Any]] = {
        "--steps": {"num_inference_steps": request.steps},
        "--guidance": {"guidance_scale": request.guidance},
        "--frames": {"num_frames" if "num_frames" in takes else "video_length": request.frames},
        "--negative": {"negative_prompt": request.negative},
        "--size": {"width": width, "height": height},
    }
    given: dict[str, Any] = {}
    for option, arguments in values.items():
        for name, value in arguments.items():
            if value is not None and name not in takes:
                raise ConfigError(f"{type(pipe.wrapped).__name__} takes no {option}; leave it out")
            given |= {} if value is None else {name: value}
    return given


def _subject(request: Request, pipe: DiffEffPipeline, takes: dict[str, Any]) -> dict[str, Any]:
    if "class_labels" not in takes:
        if request.label is not None:
            raise ConfigError(f"{type(pipe.wrapped).__name__} is not class-conditional: give a prompt, not --class")
        if request.prompt is None:
            raise ConfigError('a prompt is missing: diffeff generate "a red circle moving left, camera static"')
        return {"prompt": request.prompt}
    label = request.prompt if request.label is None else request.label
    if label is None:
        raise ConfigError("this model is class-conditional: say which class with --class")
    return {"class_labels": [_class_id(pipe, label)]}


def _class_id(pipe: DiffEffPipeline, label: str) -> int:
    names: dict[str, int] = getattr(pipe.wrapped, "labels", None) or {}
    if label in names:
        return names[label]
    count = int(pipe.wrapped.transformer.config.num_embeds_ada_norm)
    if label.isdecimal() and int(label) < count:
        return int(label)
    raise ConfigError(f"there is no class {label!r}; known: {', '.join(names) or f'0 to {count - 1}'}")


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of `832x480`; None for both when there is no text. Raises ConfigError."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"--size is {text!r}; expected width x height in pixels, such as 832x480")
    return int(width), int(height)


def placement(device: str, dtype: str) -> tuple[str, str]:
    """What `auto` means on this machine, as names torch knows. Raises ConfigError for a device that is not here."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device, True):
        raise ConfigError(f"torch finds no device {device!r} here; diffeff doctor says why")
    return device, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype


def recommended(model: str) -> dict[str, Any]:
    """What a bundled model's card recommends, as arguments of a pipeline's call; empty for other models."""
    from diffeff.zoo import bundled

    if model not in bundled.NAMES:
        return {}
    options: dict[str, Any] = bundled.recommended(model).call_options()
    return options


def scene_of(request: Request) -> Scene | None:
    """The scene the caption describes, if the model is one whose results can be read back from pixels."""
    from diffeff.zoo import bundled
    from diffeff.zoo.world import Scene

    if request.model not in bundled.NAMES or request.prompt is None:
        return None
    try:
        return Scene.parse(request.prompt)
    except ValueError:
        return None


def call(pipe: DiffEffPipeline, options: dict[str, Any], steps: int, seed: int) -> NDArray[np.float32]:
    """Run the pipeline for so many steps, always from the same noise; returns its frames.

    Raises DiffEffError with the pipeline's own words when it refuses the options.
    """
    import torch
    from numpy import isnan

    from diffeff.media import frames_of

    noise = torch.Generator("cpu").manual_seed(seed)  # noise drawn on the CPU is the same on every device
    try:
        frames = frames_of(pipe(**(options | {"num_inference_steps": steps}), generator=noise))
    except (ValueError, TypeError) as error:
        if isinstance(error, DiffEffError):
            raise
        raise DiffEffError(f"{type(pipe.wrapped).__name__} refused the request: {error}") from error
    if isnan(frames).any():
        log.warning("the result holds pixels that are not numbers, shown black: try --dtype float32")
    return frames


def _parameters(pipe: DiffEffPipeline) -> dict[str, Any]:
    return dict(inspect.signature(type(pipe.wrapped).__call__).parameters)
