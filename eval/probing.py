"""What is computed from one item, in a worker: features, numbers of its own, numbers against its partner.

Each file is read once. An item is a unit: its frames go through a source together and never with those of another
item, so that a resumed run, or one spread over workers, computes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from diffeff.errors import ConfigError
from diffeff.eval.entries import Entry
from diffeff.eval.features.parse import source
from diffeff.eval.features.source import ClipSource, TextImageSource
from diffeff.eval.items import Item, read_item
from diffeff.eval.metrics import fidelity, temporal
from diffeff.eval.metrics.perceptual import MapSource, perceptual
from diffeff.eval.metrics.world import shown
from diffeff.media import Clip
from diffeff.zoo.world import Scene

__all__ = [
    "LATENTS",
    "LPIPS",
    "OWN",
    "PIXELS",
    "WORLD",
    "Ability",
    "Features",
    "Outcome",
    "Sources",
    "Task",
    "abilities_of",
    "embed_text",
    "notes_on_texts",
    "probe",
    "spread",
]

Rows = NDArray[np.float32]
Scalars = Mapping[str, float]
OfClip = Callable[[Clip, Clip], float]
OfFrames = Callable[[Clip, Clip], NDArray[Any]]


@dataclass(frozen=True)
class Ability:
    """A feature source as the process that plans the work knows it; the source itself is with the workers."""

    spec: str
    label: str
    facts: Mapping[str, Any]
    dim: int
    clip_dim: int | None
    embed_dim: int | None
    text_scale: float | None
    whole_clips: bool
    """Whether it compares texts with whole clips, motion included, and not with frames."""
    maps: bool


@dataclass(frozen=True)
class Sources:
    """Loads feature sources in a worker."""

    specs: tuple[str, ...]
    device: str

    def __call__(self) -> tuple[Any, ...]:
        return tuple(source(spec, device=self.device) for spec in self.specs)


@dataclass(frozen=True)
class Features:
    """One kind of vector of one source.

    `frames` are features of up to so many frames of a clip, `embeds` the same in the space of texts, `clips` features
    of whole clips, `match` what a text is compared with: the whole clip where the source sees clips, else its frames.
    """

    kind: str
    source: int
    ability: Ability
    frames: int
    device: str

    @property
    def dim(self) -> int:
        """Length of a vector."""
        dims = {"frames": self.ability.dim, "clips": self.ability.clip_dim}
        return dims.get(self.kind, self.ability.embed_dim) or 0

    @property
    def name(self) -> str:
        """Names the kind in stores and statistics: `frames16`, `clips`."""
        return f"{self.kind}{self.frames}" if self.kind != "clips" else self.kind

    @property
    def text_with(self) -> str:
        """What a text is compared with, in words."""
        return "the whole clip" if self.ability.whole_clips else f"each of up to {self.frames} frames"

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the vectors: the source's description and the kind of device it ran on."""
        return {**self.ability.facts, "device": torch.device(self.device).type}


@dataclass(frozen=True)
class Task:
    """What is missing of one item. `own` are numbers of the item alone, `versus` numbers against `partner`."""

    entry: Entry
    features: tuple[Features, ...] = ()
    own: tuple[str, ...] = ()
    partner: Entry | None = None
    versus: tuple[str, ...] = ()
    backbone: int | None = None
    """The source whose feature maps LPIPS compares."""

    @property
    def wants(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.features or self.own or self.versus)


@dataclass(frozen=True)
class Outcome:
    """What came of a task: vectors in the order of its features, numbers by name."""

    rows: tuple[Rows, ...] = ()
    own: Mapping[str, Scalars] = field(default_factory=dict)
    versus: Mapping[str, Scalars] = field(default_factory=dict)


OWN: Mapping[str, Callable[[Clip], float | None]] = {
    "flicker": temporal.flicker,
    "motion": temporal.motion_magnitude,
    "warping_error": temporal.warping_error,
}
"""Numbers of one item alone."""

PIXELS: Mapping[str, tuple[OfClip, OfFrames]] = {
    "psnr": (fidelity.psnr, fidelity.psnr_per_frame),
    "ssim": (fidelity.ssim, fidelity.ssim_per_frame),
    "mae": (fidelity.mae, fidelity.mae_per_frame),
}
"""Numbers of an item's pixels against its partner's: of the clip, and of each frame."""

LATENTS: Mapping[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "latent_cosine": fidelity.latent_cosine,
    "latent_l2": fidelity.latent_relative_l2,
}

LPIPS = "lpips"
"""How the names of numbers over feature maps begin; the source follows."""

WORLD = "world"
"""The caption read back from the pixels; its numbers are 1 (right) or 0 for each attribute."""


def abilities_of(sources: tuple[Any, ...], specs: tuple[str, ...]) -> tuple[Ability, ...]:
    return tuple(_ability(spec, found) for spec, found in zip(specs, sources, strict=True))


def _ability(spec: str, found: Any) -> Ability:
    text = found if isinstance(found, TextImageSource) else None
    return Ability(
        spec=spec,
        label=found.label,
        facts=dict(found.describe()),
        dim=found.dim,
        clip_dim=found.clip_dim if isinstance(found, ClipSource) else None,
        embed_dim=None if text is None else text.embed_dim,
        text_scale=None if text is None else text.text_scale,
        whole_clips=hasattr(found, "embed_clips"),
        maps=isinstance(found, MapSource),
    )


def notes_on_texts(sources: tuple[Any, ...], task: tuple[int, tuple[str, ...]]) -> tuple[str, ...]:
    """What a source says about reading these texts: how many are cut off, or have words it does not know."""
    number, texts = task
    say = getattr(sources[number], "text_notes", None)
    return () if say is None else tuple(say(list(texts)))


def embed_text(sources: tuple[Any, ...], task: tuple[int, str]) -> Rows:
    number, text = task
    with torch.inference_mode():
        return _array(sources[number].embed_texts([text]))


def probe(sources: tuple[Any, ...], task: Task) -> Outcome:
    clip = _read(task.entry) if task.features or task.own or set(task.versus) - set(LATENTS) else None
    if clip is None:
        return Outcome(versus=_latents(task))
    with torch.inference_mode():
        rows = tuple(_vectors(sources[wanted.source], wanted, clip) for wanted in task.features)
        own = {name: _own(name, task.entry, clip) for name in task.own}
        versus = _latents(task) | _pixels(sources, task, clip)
    return Outcome(rows, own, versus)


def _read(entry: Entry) -> Clip:
    return read_item(Item(entry.name, entry.path))


def _vectors(source: Any, wanted: Features, clip: Clip) -> Rows:
    """`[n, dim]`: one row a frame, or one for the whole clip."""
    whole = wanted.kind == "clips" or (wanted.kind == "match" and hasattr(source, "embed_clips") and len(clip) > 1)
    frames = torch.from_numpy(clip if whole else clip[spread(len(clip), wanted.frames)])
    frames = frames.permute(0, 3, 1, 2).contiguous()
    if whole:
        return _array(source.clips(frames[None]) if wanted.kind == "clips" else source.embed_clips(frames[None]))
    return _array(source.images(frames) if wanted.kind == "frames" else source.embed_images(frames))


def spread(frames: int, most: int) -> list[int]:
    """Numbers of at most `most` frames, evenly spread, first and last among them; the middle one when it is one."""
    if frames <= most:
        return list(range(frames))
    return [frames // 2] if most == 1 else [round(i * (frames - 1) / (most - 1)) for i in range(most)]


def _array(rows: Tensor) -> Rows:
    return rows.detach().to("cpu", torch.float32).numpy()


def _own(name: str, entry: Entry, clip: Clip) -> Scalars:
    if name == WORLD:
        return _seen(entry, clip)
    value = OWN[name](clip)
    return {"value": math.nan if value is None else value}


def _seen(entry: Entry, clip: Clip) -> Scalars:
    return {name: float(right) for name, right in shown(Scene.parse(entry.prompt or ""), clip).items()}


def _pixels(sources: tuple[Any, ...], task: Task, clip: Clip) -> dict[str, Scalars]:
    """Numbers against the partner that need its pixels."""
    names = [name for name in task.versus if name not in LATENTS]
    if not names or task.partner is None:
        return {}
    other = _read(task.partner)
    _same_shape(task.entry, clip, task.partner, other)
    found = {name: _against(*PIXELS[name], other, clip) for name in names if name in PIXELS}
    for name in set(names) - set(found):
        backbone = sources[task.backbone or 0]
        found[name] = {"value": perceptual(other, clip, backbone)}
    return found


def _against(whole: OfClip, per_frame: OfFrames, reference: Clip, clip: Clip) -> Scalars:
    frames = per_frame(reference, clip)
    return {"value": whole(reference, clip), "lowest_frame": float(frames.min()), "highest_frame": float(frames.max())}


def _same_shape(entry: Entry, clip: Clip, partner: Entry, other: Clip) -> None:
    if clip.shape != other.shape:
        raise ConfigError(
            f"{entry.path} is {_size(clip)} but its reference {partner.path} is {_size(other)}: pixels can only be "
            "compared at one size and length. Make them alike, or ask for set metrics only (fid, kid, ...)."
        )


def _size(clip: Clip) -> str:
    frames, height, width, _ = clip.shape
    return f"{width}x{height}" + (f" with {frames} frames" if frames > 1 else "")


def _latents(task: Task) -> dict[str, Scalars]:
    names = [name for name in task.versus if name in LATENTS]
    if not names or task.partner is None or task.partner.latents is None or task.entry.latents is None:
        return {}
    reference, mine = (load_file(path)["latents"].numpy() for path in (task.partner.latents, task.entry.latents))
    return {name: {"value": LATENTS[name](reference, mine)} for name in names}
