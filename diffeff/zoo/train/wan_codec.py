"""The autoencoder of `sprites-wan`: stage 1 of its training.

The outline of the object decides the shape word and is a few per cent of the pixels, so it is weighted up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffeff.zoo.score import score_clips
from diffeff.zoo.train.harness import (
    EMA,
    Clock,
    JsonLog,
    Muon,
    TrainOptions,
    cosine,
    load_checkpoint,
    progress_bar,
    save_checkpoint,
    set_lr,
    state_of,
)
from diffeff.zoo.world import SCENES, TRAIN, Scene, render, sample_scenes

Vae: TypeAlias = Any  # diffusers.AutoencoderKLWan
_diffusers: Any = diffusers  # a lazy module, opaque to type checkers

FRAMES, SIZE, CHANNELS = 9, 64, 16


def build_vae(seed: int = 0) -> Vae:
    """A 1.9 M-parameter AutoencoderKLWan: 9x64x64 clips to 16x5x8x8 latents.

    ``patch_size=4`` folds 4x4 pixels into channels, exactly and for free, so every convolution runs on a
    16x16 grid.
    """
    torch.manual_seed(seed)
    vae = _diffusers.AutoencoderKLWan(
        base_dim=32,
        decoder_base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS,  # measured after training
        latents_std=[1.0] * CHANNELS,
    )
    _init_vae(vae)
    return vae


@torch.no_grad()
def _init_vae(vae: Vae) -> None:
    """Variance-preserving start: halves the error after 80 steps compared with the default initialisation."""
    silu_power = 0.356  # E[silu(x)^2] for standard normal x
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            fan_in = layer.weight[0].numel()
            after_silu = name.endswith(("conv1", "conv2", "conv_out"))
            nn.init.normal_(layer.weight, std=(fan_in * (silu_power if after_silu else 1.0)) ** -0.5)
            if name.endswith("conv2"):
                layer.weight.mul_(0.3)
            if layer.bias is not None:
                layer.bias.zero_()
    # Start almost deterministic: a latent noise of std exp(-3) instead of 1 would hide the signal.
    vae.quant_conv.weight[CHANNELS:].zero_()
    vae.quant_conv.bias[CHANNELS:].fill_(-6.0)


def _vae_optimizers(vae: Vae) -> list[torch.optim.Optimizer]:
    kernels: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in vae.named_parameters():
        inner = p.ndim >= 4 and min(p.shape[0], p[0].numel()) >= 32 and "quant_conv" not in name
        (kernels if inner else rest).append(p)
    return [Muon(kernels, lr=0.02), torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def _vae_batch(full: bool, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, h, w] in [-1, 1] and their loss weights [B, 1, F, h, w]."""
    clip, truth = render(sample_scenes(TRAIN, batch), device=device, return_truth=True)
    mask = truth.mask.flatten(0, 1).unsqueeze(1)
    band = F.max_pool2d(mask, 5, 1, 2) + F.max_pool2d(-mask, 5, 1, 2)  # dilation minus erosion
    weight = 1.0 + 4.0 * band.view(batch, 1, FRAMES, SIZE, SIZE)
    clip = clip.transpose(1, 2) * 2 - 1
    if full:
        return clip, weight
    x, y = torch.randint(0, SIZE // 2 + 1, (2,)).tolist()
    window = (..., slice(y, y + SIZE // 2), slice(x, x + SIZE // 2))
    return clip[window], weight[window]


def _vae_loss(vae: Vae, clip: Tensor, weight: Tensor) -> Tensor:
    posterior = vae.encode(clip).latent_dist
    error = vae.decode(posterior.sample()).sample - clip
    pixels = (weight * (error.square() + 0.03 * error.abs())).mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    loss: Tensor = pixels + 3e-5 * kl
    return loss


@torch.no_grad()
def vae_roundtrip(vae: Vae, clips: Tensor) -> Tensor:
    """Clips [B, F, 3, H, W] in [0, 1] through the autoencoder (latent mean) and back, same layout."""
    out = []
    for part in torch.split(clips, 16):
        latent = vae.encode(part.transpose(1, 2) * 2 - 1).latent_dist.mode()
        out.append(vae.decode(latent).sample.transpose(1, 2))
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1)


def _vae_report(vae: Vae, device: torch.device, count: int = 32) -> dict[str, float]:
    scenes = list(SCENES[-count:])
    clips = render(scenes, generator=torch.Generator().manual_seed(123), device=device)
    seen = vae_roundtrip(vae, clips)
    psnr = -10 * math.log10(float((seen - clips).square().mean()))
    return {"psnr": psnr, **{k: v.accuracy for k, v in score_clips(scenes, seen).attributes.items()}}


def train_vae(options: TrainOptions, minutes: float) -> Vae:
    """Stage 1, for `minutes`. Returns the averaged weights with `latents_mean` / `latents_std` measured and stored."""
    path, device = options.work / "vae.pt", options.device
    vae = build_vae(options.seed).to(device)
    ema, optimizers = EMA(vae, decay=0.997), _vae_optimizers(vae)
    saved = load_checkpoint(path) if options.resume else None
    clock = Clock(minutes, saved["elapsed"] if saved else 0.0)
    record, steps = JsonLog(options.work / "train.log", fresh=saved is None), 0
    if saved:
        vae.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        steps = saved["steps"]
    torch.manual_seed(options.seed + 1 + steps)
    reported = clock.elapsed
    with progress_bar("autoencoder", clock) as tick:
        while not clock.done:
            full = clock.fraction > 0.75
            small = 8 if device.type == "cpu" else 64
            loss = _vae_loss(vae, *_vae_batch(full, device, small // 4 if full else small))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for optimizer in optimizers:
                set_lr(optimizer, cosine(clock.fraction))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update()
            steps += 1
            tick(f"step {steps} loss {loss.item():.4f}")
            if clock.elapsed - reported > 1.0 or clock.done:
                reported = clock.elapsed
                with ema.applied():
                    report = _vae_report(vae, device)
                record.write(stage="vae", minute=clock.elapsed, step=steps, loss=loss.item(), **report)
                save_checkpoint(path, state_of(vae, ema, optimizers, steps, clock.elapsed))
    ema.copy_to()
    _store_latent_statistics(vae, device)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def _store_latent_statistics(vae: Vae, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    latents = []
    for _ in range(24):
        clips = render(sample_scenes(TRAIN, 16, generator), generator=generator, device=device)
        latents.append(vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode())
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())


@torch.no_grad()
def encode_scenes(vae: Vae, scenes: Sequence[Scene], generator: torch.Generator, device: torch.device) -> Tensor:
    """Render scenes and return their normalised latents [B, 16, 5, 8, 8]."""
    clips = render(scenes, generator=generator, device=device)
    latents = torch.cat(
        [vae.encode(part.transpose(1, 2) * 2 - 1).latent_dist.mode() for part in torch.split(clips, 16)]
    )
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std
