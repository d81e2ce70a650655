"""Ways to spoil a clip by a known amount: what a feature that measures quality has to notice.

Every function takes clips [B, F, 3, H, W] in [0, 1] and one strength per clip in [0, 1], where 0 changes nothing, and
a seeded CPU generator; the same draw gives the same clips. `KINDS` names them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FRAME_KINDS", "KINDS", "MOST", "Degradation", "degrade"]

Degradation: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]

#: What strength 1 means: standard deviation of noise, blur in pixels of a 64-pixel frame, share of frames, ...
MOST: Mapping[str, float] = MappingProxyType(
    {
        "noise": 0.35,
        "blur": 3.0,
        "texture": 0.25,
        "mosaic": 1.0,
        "fade": 0.8,
        "ghost": 0.5,
        "warp": 5.0,
        "flicker": 0.2,
        "blotches": 0.35,
        "scatter": 0.6,
        "repeat": 1.0,
        "shuffle": 1.0,
    }
)


def _each(strength: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1, 1]."""
    return strength.view(-1, 1, 1, 1, 1)


def noise(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, fresh in every frame."""
    return clips + _each(strength * MOST["noise"]) * torch.randn(clips.shape, generator=generator)


def blur(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur, sigma in proportion to the frame's size."""
    del generator
    height, width = clips.shape[-2:]
    sigma = (strength * MOST["blur"] * height / 64).clamp(min=1e-3)
    reach = math.ceil(3 * float(sigma.max()))
    offsets = torch.arange(-reach, reach + 1)
    taps = torch.softmax(-(offsets.square()) / (2 * sigma.square().unsqueeze(1)), dim=1)
    taps = taps.repeat_interleave(clips.shape[1] * clips.shape[2], 0).unsqueeze(1).unsqueeze(1)
    planes = clips.reshape(1, -1, height, width)
    planes = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    planes = F.conv2d(planes, taps, groups=planes.shape[1])
    return F.conv2d(planes, taps.transpose(2, 3), groups=planes.shape[1]).view(clips.shape)


def _cloud(count: int, cells: int, size: tuple[int, int], generator: torch.Generator, channels: int = 1) -> Tensor:
    """Smooth random fields [count, channels, H, W] of about unit variance with `cells` cells a side."""
    field = torch.randn(count, channels, cells, cells, generator=generator)
    return F.interpolate(field, size=size, mode="bicubic", align_corners=True)


def texture(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A wrong floor: a static pattern, of a grain drawn at random, over the whole picture."""
    cells = (6, 11, 20, 32)[int(torch.randint(4, (1,), generator=generator))]
    pattern = _cloud(len(clips), cells, (clips.shape[-2], clips.shape[-1]), generator)
    return clips + _each(strength * MOST["texture"]) * pattern.unsqueeze(1)


def mosaic(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blocks of 8x8 pixels (of a 64-pixel frame) shine through."""
    del generator
    flat = clips.flatten(0, 1)
    blocks = F.interpolate(F.adaptive_avg_pool2d(flat, 8), size=flat.shape[-2:], mode="nearest")
    return torch.lerp(clips, blocks.view(clips.shape), _each(strength * MOST["mosaic"]))


def fade(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast goes: towards the mean grey of the clip."""
    del generator
    grey = clips.mean((1, 2, 3, 4), keepdim=True).expand_as(clips)
    return torch.lerp(clips, grey, _each(strength * MOST["fade"]))


def ghost(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """The neighbour in the batch shines through, half of each at strength 1."""
    del generator
    return torch.lerp(clips, clips.roll(1, 0), _each(strength * MOST["ghost"]))


def warp(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Outlines wobble: every frame is bent by its own smooth random field."""
    batch, frames, _, height, width = clips.shape
    bend = _cloud(batch * frames, 6, (height, width), generator, channels=2)
    pixels = (strength * MOST["warp"] / 64 * 2).repeat_interleave(frames).view(-1, 1, 1, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(batch * frames, -1, -1), [batch * frames, 1, height, width], False)
    grid = still + (bend * pixels * 0.5).permute(0, 2, 3, 1)
    return F.grid_sample(clips.flatten(0, 1), grid, padding_mode="border", align_corners=False).view(clips.shape)


def flicker(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Soft clouds of light that change from frame to frame."""
    batch, frames = clips.shape[:2]
    clouds = _cloud(batch * frames, 5, (clips.shape[-2], clips.shape[-1]), generator)
    return clips + _each(strength * MOST["flicker"]) * clouds.view(batch, frames, 1, *clouds.shape[-2:])


def blotches(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Soft spots of any colour, fresh in every frame: noise that a latent decoder made of noise."""
    batch, frames = clips.shape[:2]
    cells = (8, 16)[int(torch.randint(2, (1,), generator=generator))]
    spots = _cloud(batch * frames, cells, (clips.shape[-2], clips.shape[-1]), generator, channels=3)
    return clips + _each(strength * MOST["blotches"]) * spots.view(clips.shape)


def scatter(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Pieces out of place: a share of the cells of an 8x8 or 16x16 grid shows another cell of its frame."""
    batch, frames, _, height, width = clips.shape
    cells = (8, 16)[int(torch.randint(2, (1,), generator=generator))]
    grid = (batch * frames, cells, cells)
    moved = torch.rand(grid, generator=generator) < (strength * MOST["scatter"]).repeat_interleave(frames).view(
        -1, 1, 1
    )
    shift = torch.randint(cells, (2, *grid), generator=generator) * moved
    row, column = (torch.arange(side) * cells // side for side in (height, width))
    down, right = (part[:, row][:, :, column] for part in shift)
    y = (torch.arange(height).view(1, -1, 1) + down * height // cells) % height
    x = (torch.arange(width).view(1, 1, -1) + right * width // cells) % width
    which = torch.arange(batch * frames).view(-1, 1, 1)
    return clips.flatten(0, 1)[which, :, y, x].permute(0, 3, 1, 2).view(clips.shape)


def repeat(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Dropped frames: each of the chosen share (never the first) shows the last frame that was not dropped."""
    batch, frames = clips.shape[:2]
    order = torch.rand(batch, frames - 1, generator=generator).argsort(1).argsort(1)
    lost = order < (strength * MOST["repeat"] * (frames - 1)).round().unsqueeze(1)
    shown = torch.where(F.pad(lost, (1, 0)), 0, torch.arange(frames)).cummax(1).values
    return clips[torch.arange(batch).unsqueeze(1), shown]


def shuffle(clips: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """The order of frames is disturbed, from neighbours that trade places to any order at all."""
    batch, frames = clips.shape[:2]
    push = torch.randn(batch, frames, generator=generator) * frames * strength.square().unsqueeze(1)
    order = (torch.arange(frames) + push).argsort(1)
    return clips[torch.arange(batch).unsqueeze(1), order]


#: name -> function; the first ten can be seen in a single frame, the last two need a clip.
KINDS: Mapping[str, Degradation] = MappingProxyType(
    {
        "noise": noise,
        "blur": blur,
        "texture": texture,
        "mosaic": mosaic,
        "fade": fade,
        "ghost": ghost,
        "warp": warp,
        "flicker": flicker,
        "blotches": blotches,
        "scatter": scatter,
        "repeat": repeat,
        "shuffle": shuffle,
    }
)
FRAME_KINDS: tuple[str, ...] = tuple(KINDS)[:10]


def degrade(clips: Tensor, kind: str, strength: float | Tensor, generator: torch.Generator) -> Tensor:
    """Spoil clips [B, F, 3, H, W] in [0, 1] by one kind: a strength in [0, 1] for all, or one each, [B].

    Clips of strength 0 come back as they were. A single frame cannot be spoilt by `repeat` or `shuffle`.

    Raises:
        ValueError: an unknown kind, or a strength outside [0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"there is no degradation {kind!r}: use one of {', '.join(KINDS)}")
    amount = torch.as_tensor(strength, dtype=torch.float32).expand(len(clips))
    if not bool(((amount >= 0) & (amount <= 1)).all()):
        raise ValueError(f"strength={strength} must be within [0, 1]")
    if clips.shape[1] == 1 and kind not in FRAME_KINDS:
        return clips
    spoilt = KINDS[kind](clips, amount, generator).clamp(0, 1)
    return torch.where(_each(amount) > 0, spoilt, clips)
