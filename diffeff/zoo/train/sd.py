"""`sprites-sd`: text-to-image in Stable Diffusion's format (AutoencoderKL, UNet2DConditionModel, CLIP text).

One autoencoder and one cache of latent clips serve this model and `sprites-motion`, which goes on training
the same UNet together with motion modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from diffeff.zoo.score import Scores, score_clips
from diffeff.zoo.train.harness import JsonLog, TrainOptions, load_checkpoint, save_checkpoint
from diffeff.zoo.train.latents import encode, precondition, psnr, train_autoencoder
from diffeff.zoo.world import TRAIN, Scene, render, sample_scenes

SIZE, FRAMES = 64, 8
LATENT_CHANNELS, CELL = 12, 8
VAE_SHARE = 0.32
CACHE_CLIPS = 5000


def build_autoencoder() -> Any:
    """8x down to 8x8x12, about 1.2 M parameters: one latent cell sees an 8x8 patch and its surroundings."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 80),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def object_cover(frames: Tensor) -> Tensor:
    """Where the object is: [N, 1, H, W] of 0 and 1, from frames in [0, 1]. The ground is nearly grey."""
    return ((frames.amax(1) - frames.amin(1)) > 0.4).float().unsqueeze(1)


def outline(cover: Tensor, width: int = 5) -> Tensor:
    """A band of `width` pixels along the edge of the object."""
    pad = width // 2
    return F.max_pool2d(cover, width, 1, pad) + F.max_pool2d(-cover, width, 1, pad)


class _Frames:
    """A pool of rendered frames in bytes that random crops are taken from."""

    def __init__(self, clips: int, generator: torch.Generator) -> None:
        self.generator = generator
        parts = []
        for _ in range(0, clips, 50):
            clip = render(sample_scenes(TRAIN, 50, generator), frames=FRAMES, size=SIZE, generator=generator)
            parts.append((clip.flatten(0, 1) * 255).round().byte())
        self.pool = torch.cat(parts)

    def crops(self, batch: int, side: int) -> Tensor:
        """[B, 3, side, side] in [0, 1]."""
        picks = torch.randint(len(self.pool), (batch,), generator=self.generator)
        corners = torch.randint((SIZE - side) // 8 + 1, (batch, 2), generator=self.generator) * 8
        cut = [
            self.pool[i, :, y : y + side, x : x + side]
            for i, (y, x) in zip(picks.tolist(), corners.tolist(), strict=True)
        ]
        return torch.stack(cut).float() / 255


def fit_autoencoder(options: TrainOptions, log: JsonLog, minutes: float) -> Any:
    """Train the autoencoder, or load it from the work folder."""
    vae = build_autoencoder().to(options.device)
    path = options.work / "vae.pt"
    saved = load_checkpoint(path) if options.resume else None
    if saved is not None:
        vae.load_state_dict(saved["vae"])
        vae.register_to_config(scaling_factor=1.0)
        return vae
    generator = torch.Generator().manual_seed(options.seed)
    frames = _Frames(1000, generator)
    held, scenes = validation_frames()

    def draw(fraction: float) -> tuple[Tensor, Tensor]:
        # Crops are four times cheaper; whole frames at the end settle the statistics of group norm.
        picture = frames.crops(16, 32) if fraction < 0.6 else frames.crops(6, SIZE)
        picture = picture.to(options.device)
        return picture * 2 - 1, 1 + 4 * outline(object_cover(picture))

    def validate(model: Any) -> dict[str, float]:
        back = decode(model, encode(model, held * 2 - 1))
        scores = score_clips(scenes, list(back))
        figures = {name: scores.attributes[name].accuracy for name in ("colour", "shape")}
        return {"psnr": psnr(back, held), **figures}

    train_autoencoder(
        vae, draw, validate, minutes=minutes, log=log, device=options.device, muon=0.03, adam=3e-3
    )
    precondition(vae, frames.pool[torch.randperm(len(frames.pool), generator=generator)[:1000]].float() / 127.5 - 1)
    log.write(stage="vae preconditioned", **validate(vae))
    save_checkpoint(path, {"vae": vae.state_dict()})
    return vae


def validation_frames(count: int = 96) -> tuple[Tensor, list[Scene]]:
    """Random frames [N, 3, H, W] of fresh clips, with their scenes."""
    generator = torch.Generator().manual_seed(99)
    scenes = sample_scenes(TRAIN, count, generator)
    clips = render(scenes, frames=FRAMES, size=SIZE, generator=generator)
    return clips[torch.arange(count), torch.randint(FRAMES, (count,), generator=generator)], scenes


@torch.no_grad()
def decode(vae: Any, latents: Tensor, batch: int = 64) -> Tensor:
    """Frames in [0, 1] on the CPU."""
    parts = [vae.decode(chunk).sample.float().cpu() for chunk in latents.split(batch)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
