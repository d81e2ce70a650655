"""What `sprites-encoder` learns from: freshly rendered clips, most of them spoilt, and what is true of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffeff.zoo.degrade import KINDS, degrade
from diffeff.zoo.world import TRAIN, Scene, Truth, render, sample_scenes

#: Clips of a group share the ways they are spoilt; with every GROUPS groups come CLEAN groups of clean clips.
GROUP = 6
GROUPS, CLEAN = 6, 3
FRAME_TRUTH, CLIP_TRUTH = 5, 7
_FRAMES = (9, 9, 9, 8, 8, 8, 5, 13)


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips [B, F, 3, H, W], their scenes, what was drawn (`frame_truth` [B, F, 5], `clip_truth` [B, 7]) and how
    much each was spoilt in each way, `spoilt` [B, kinds]."""

    clips: Tensor
    scenes: list[Scene]
    frame_truth: Tensor
    clip_truth: Tensor
    spoilt: Tensor

    @property
    def trust(self) -> Tensor:
        """How far the caption can still be read, [B]: a frozen clip shows no motion."""
        return 1 - 0.9 * self.spoilt.square().amax(1)


def draw_batch(generator: torch.Generator, pool: Sequence[Scene] = TRAIN, groups: int = GROUPS) -> Batch:
    """`groups` groups of spoilt clips and half as many clean ones; a group shares its kinds, not its strengths."""
    total = (groups + groups * CLEAN // GROUPS) * GROUP
    scenes = sample_scenes(pool, total, generator)
    frames = _FRAMES[int(torch.randint(len(_FRAMES), (1,), generator=generator))]
    clips, truth = render(scenes, frames=frames, generator=generator, return_truth=True)
    spoilt = torch.zeros(total, len(KINDS))
    for group in range(groups):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        count = 1 + int(torch.rand((), generator=generator) < 0.35)
        for kind in torch.randperm(len(KINDS), generator=generator)[:count].tolist():
            strength = _strengths(generator)
            clips[rows] = degrade(clips[rows], tuple(KINDS)[kind], strength, generator)
            spoilt[rows, kind] = strength.sqrt()  # small strengths matter most
    clips = (clips * 255).round() / 255
    return Batch(clips, scenes, *_truth(truth, clips.shape[-1]), spoilt)


def _strengths(generator: torch.Generator) -> Tensor:
    """Mostly small, and now and then all there is: a clip may be frozen altogether."""
    strength = torch.rand(GROUP, generator=generator).square()
    return torch.where(torch.rand(GROUP, generator=generator) < 0.12, 1.0, strength)


def _truth(truth: Truth, size: int) -> tuple[Tensor, Tensor]:
    """What was drawn as numbers around one: of each frame [B, F, 5], and how it changes over the clip [B, 7]."""
    area = (truth.mask.mean((2, 3)).sqrt() - 0.32) * 12
    place = (truth.centre / size - 0.5) * 5
    zoom = truth.zoom.log() / math.log(1.26)
    frame = torch.cat((place, torch.stack((area, truth.pan / size * 6, zoom), -1)), -1)
    change = (frame[:, -1] - frame[:, 0]) / 2
    return frame, torch.cat((change[:, :2], change[:, 3:], frame[..., :3].mean(1)), -1)
