"""What of a model's call can be varied, and the arguments of the call at one point of an axis."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from diffeff import loading
from diffeff.errors import ConfigError, UnsupportedModel
from diffeff.pipeline import DiffEffPipeline
from diffeff.zoo import bundled, tiny

__all__ = ["AXES", "TINY", "Loaded", "Point", "Subject", "TinySubject", "subject_of", "tokens_of"]

AXES = ("tokens", "frames", "steps", "batch")
TINY = "tiny:"
Value = Any
"""(height, width) of a point of the tokens axis, an int of the others."""
_CAPTION = "a red circle moving left, camera static"
_FACTORS = (1.0, 1.5, 2.0, 2.5)
# Arguments of the call that an axis varies, whatever they are set to for the others.
_VARIED = {"tokens": ("height", "width"), "frames": ("num_frames",), "steps": ("num_inference_steps",), "batch": ()}


@dataclass(frozen=True)
class Point:
    """One value of one axis; everything else stays as it is."""

    axis: str
    value: Value


class Subject(Protocol):
    """A pipeline and the calls it can be measured with."""

    pipe: DiffEffPipeline

    def axes(self) -> tuple[str, ...]:
        """What can be varied."""

    def defaults(self, axis: str) -> tuple[Value, ...]:
        """Values to measure at when none are given."""

    def call(self, point: Point, seed: int) -> dict[str, Any]:
        """Arguments of the pipeline's call, with a fresh generator."""

    def x(self, point: Point) -> float | None:
        """Where the point stands on its axis; None where only the denoiser can tell (`tokens_of`)."""


def subject_of(
    model: str, call: Mapping[str, Any], device: str = "cpu", dtype: str = "float32", pipe: Any = None
) -> Subject:
    """`tiny:NAME`, a bundled model, a folder or a hub id; `pipe` is used as it is in place of loading `model`.

    Raises what loading raises, and ConfigError for an argument the pipeline does not take.
    """
    if pipe is None and model.startswith(TINY):
        return TinySubject(model.removeprefix(TINY), call, device, dtype)
    if pipe is None:
        pipe = loading.load(model, dtype=getattr(torch, dtype)).to(device)
    return Loaded(pipe, model, call)


class TinySubject:
    """A tiny random pipeline. Sizes and frames are those of its latents."""

    def __init__(self, name: str, call: Mapping[str, Any], device: str, dtype: str) -> None:
        self.name, self.more = name, dict(call)
        self.row = tiny.tiny(name)
        pipe = tiny.make(name)
        self.pipe = DiffEffPipeline(pipe.to(device) if dtype == "float32" else pipe.to(device, getattr(torch, dtype)))

    def axes(self) -> tuple[str, ...]:
        has = {
            "tokens": self.row.resizable,
            "frames": self.row.resizable and self.row.size[0] > 1,
            "steps": True,
            "batch": self.row.max_batch > 1,
        }
        return tuple(axis for axis in AXES if has[axis])

    def defaults(self, axis: str) -> tuple[Value, ...]:
        frames, height, width = self.row.size
        found: dict[str, tuple[Value, ...]] = {
            "tokens": tuple((int(height * f), int(width * f)) for f in _FACTORS),
            "frames": tuple(frames * k for k in (1, 2, 3, 4)),
            "steps": (4, 8, 12, 16),
            "batch": tuple(n for n in (1, 2, 4, 8) if n <= self.row.max_batch),
        }
        return found[axis]

    def call(self, point: Point, seed: int) -> dict[str, Any]:
        options: dict[str, Any] = {"steps": 4, "batch": 1}
        if point.axis in options:
            options[point.axis] = point.value
        elif point.axis == "tokens":
            options["size"] = tuple(point.value)
        else:
            options["size"] = (point.value, *self.row.size[1:])
        more = {name: value for name, value in self.more.items() if name not in _VARIED[point.axis]}
        return tiny.call_kwargs(self.name, self.pipe.wrapped, seed=seed, **options, **more)

    def x(self, point: Point) -> float | None:
        return None if point.axis == "tokens" else float(point.value)


class Loaded:
    """A loaded pipeline with text or classes as its input, or with `call` holding every input it needs.

    Sizes are pixels. Latents are returned undecoded where the pipeline can, so that the denoiser is what is measured.
    """

    def __init__(self, pipe: Any, model: str, call: Mapping[str, Any]) -> None:
        self.pipe = pipe if type(pipe) is DiffEffPipeline else DiffEffPipeline(pipe)
        self.pipe.set_progress_bar_config(disable=True)
        self.takes = inspect.signature(type(self.pipe.wrapped).__call__).parameters
        for name in call:
            if name not in self.takes:
                raise ConfigError(f"{type(self.pipe.wrapped).__name__} takes no {name!r}; leave it out")
        card = bundled.recommended(model).call_options() if model in bundled.NAMES else {}
        self.base = self._own(call) | {k: v for k, v in card.items() if k in self.takes} | dict(call)

    def _own(self, call: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"num_inference_steps": self.takes["num_inference_steps"].default}
        if "class_labels" in self.takes:
            return found | {"class_labels": [0], "output_type": "np"}
        return found | {"output_type": "latent"} | ({} if "prompt_embeds" in call else {"prompt": _CAPTION})

    @property
    def _frames(self) -> str:
        return "video_length" if "video_length" in self.takes else "num_frames"

    def axes(self) -> tuple[str, ...]:
        has = {
            "tokens": {"height", "width"} <= set(self.takes),
            "frames": self._frames in self.takes,
            "steps": True,
            "batch": "class_labels" in self.takes or self.base.get("prompt") is not None,
        }
        return tuple(axis for axis in AXES if has[axis])

    def defaults(self, axis: str) -> tuple[Value, ...]:
        """Multiples of the base's values. Raises ConfigError where the base leaves sizes or frames to the pipeline."""
        if axis == "batch":
            return (1, 2, 4, 8)
        if axis == "steps":
            half = max(1, int(self.base["num_inference_steps"]) // 2)
            return tuple(half * k for k in (1, 2, 3, 4))
        needed = ("height", "width") if axis == "tokens" else (self._frames,)
        if any(self.base.get(name) is None for name in needed):
            raise ConfigError(
                f"the {axis} axis of this model needs a start: give {' and '.join(needed)} in the call, or its points"
            )
        values = [int(self.base[name]) for name in needed]
        if axis == "tokens":
            # Multiples of 16 pixels: an autoencoder's 8 and a patch of 2.
            return tuple(tuple(16 * max(1, round(v * f / 16)) for v in values) for f in (1.0, 1.5, 2.0, 3.0))
        first = self._latent_frames(values[0])
        return tuple((first * k - 1) * self._stride + 1 for k in (1, 2, 3, 4))

    @property
    def _stride(self) -> int:
        """Frames per frame of the latents."""
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        return next((int(getattr(self.pipe.wrapped, n)) for n in names if hasattr(self.pipe.wrapped, n)), 1)

    def _latent_frames(self, frames: int) -> int:
        return (frames - 1) // self._stride + 1

    def call(self, point: Point, seed: int) -> dict[str, Any]:
        given = {**self.base, "generator": torch.Generator("cpu").manual_seed(seed)}
        if point.axis == "steps":
            return given | {"num_inference_steps": point.value}
        if point.axis == "frames":
            return given | {self._frames: point.value}
        if point.axis == "tokens":
            return given | {"height": point.value[0], "width": point.value[1]}
        name = "class_labels" if "class_labels" in self.takes else "prompt"
        one = given[name][:1] if isinstance(given[name], list) else [given[name]]
        return given | {name: one * int(point.value)}

    def x(self, point: Point) -> float | None:
        if point.axis == "tokens":
            return None
        return float(self._latent_frames(point.value) if point.axis == "frames" else point.value)


class _SeenError(Exception):
    """Ends a call once its first block was reached."""


def tokens_of(pipe: DiffEffPipeline, call: Mapping[str, Any]) -> float:
    """Positions of the image stream at the denoiser's first block, all frames of one row: the tokens of a transformer,
    the finest feature map of a UNet. Runs the call up to there, without a plan.

    Raises UnsupportedModel for an unknown architecture or one whose blocks were not reached.
    """
    denoiser = pipe.denoisers[0]
    block = denoiser.blocks[0]
    seen: dict[str, int] = {}

    def on_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["rows"] = len(denoiser.argument(denoiser.sample, args, kwargs))

    def on_block(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape = block.io.read(args, kwargs).image.shape
        seen["tokens"] = (prod(shape[:2]) if len(shape) == 3 else prod(shape) // shape[1]) // seen["rows"]
        raise _SeenError

    hooks = [
        denoiser.module.register_forward_pre_hook(on_call, with_kwargs=True),
        block.module.register_forward_pre_hook(on_block, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            pipe.wrapped(**call)
    except _SeenError:
        return float(seen["tokens"])
    finally:
        for hook in hooks:
            hook.remove()
    raise UnsupportedModel(f"{denoiser.name} ({denoiser.family}) never reached its first block: tokens cannot be told")
