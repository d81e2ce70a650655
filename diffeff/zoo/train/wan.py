"""Train `sprites-wan`: a text-to-video pipeline in the Wan format, small enough for one CPU core.

Stage 1 trains the autoencoder with the object's outline weighted up (the outline decides the shape word and
is a few per cent of the pixels). Stage 2 trains text encoder and transformer together on latents of freshly
rendered clips, by flow matching. Both stages follow the clock and can be interrupted.
"""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffeff.zoo.score import Scores, score_clips, score_table, write_card
from diffeff.zoo.train.harness import (
    EMA,
    Clock,
    JsonLog,
    Muon,
    TrainOptions,
    cosine,
    load_checkpoint,
    progress_bar,
    publish,
    save_checkpoint,
    set_lr,
    split_parameters,
)
from diffeff.zoo.world import ATTRIBUTES, HELD_OUT, SCENES, TRAIN, Scene, render, sample_scenes

log = logging.getLogger("diffeff")

FRAMES, SIZE, CHANNELS = 9, 64, 16
TEXT_WIDTH, WIDTH, LAYERS = 64, 192, 8
STEPS, GUIDANCE, FLOW_SHIFT = 30, 3.0, 3.0
VAE_SHARE = 0.11  # of the wall-clock budget
_SCRATCH_MEAN_STD = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}


# ---------------------------------------------------------------- stage 1: autoencoder


def build_vae(seed: int = 0) -> AutoencoderKLWan:
    """A 1.9 M-parameter AutoencoderKLWan: 9x64x64 clips to 16x5x8x8 latents.

    ``patch_size=4`` folds 4x4 pixels into channels, exactly and for free, so every convolution runs on a
    16x16 grid.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
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
        **_SCRATCH_MEAN_STD,
    )
    _init_vae(vae)
    return vae


@torch.no_grad()
def _init_vae(vae: AutoencoderKLWan) -> None:
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


def _vae_optimizers(vae: AutoencoderKLWan) -> list[torch.optim.Optimizer]:
    kernels, rest = [], []
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


def _vae_loss(vae: AutoencoderKLWan, clip: Tensor, weight: Tensor) -> Tensor:
    posterior = vae.encode(clip).latent_dist
    error = vae.decode(posterior.sample()).sample - clip
    pixels = (weight * (error.square() + 0.03 * error.abs())).mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return pixels + 3e-5 * kl


@torch.no_grad()
def vae_roundtrip(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Clips [B, F, 3, H, W] in [0, 1] through the autoencoder (latent mean) and back, same layout."""
    out = []
    for part in clips.split(16):
        latent = vae.encode(part.transpose(1, 2) * 2 - 1).latent_dist.mode()
        out.append(vae.decode(latent).sample.transpose(1, 2))
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1)


def _vae_report(vae: AutoencoderKLWan, device: torch.device, count: int = 32) -> dict[str, float]:
    scenes = list(SCENES[-count:])
    clips = render(scenes, generator=torch.Generator().manual_seed(123), device=device)
    seen = vae_roundtrip(vae, clips)
    psnr = -10 * math.log10(float((seen - clips).square().mean()))
    return {"psnr": psnr, **{k: v.accuracy for k, v in score_clips(scenes, seen).attributes.items()}}


def train_vae(options: TrainOptions) -> AutoencoderKLWan:
    """Stage 1. Returns the averaged weights with `latents_mean` / `latents_std` measured and stored."""
    path, device = options.work / "vae.pt", options.device
    vae = build_vae(options.seed).to(device)
    ema, optimizers = EMA(vae, decay=0.997), _vae_optimizers(vae)
    saved = load_checkpoint(path) if options.resume else None
    clock = Clock(options.minutes * VAE_SHARE, saved["elapsed"] if saved else 0.0)
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
            loss.backward()
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
                save_checkpoint(path, _state(vae, ema, optimizers, steps, clock.elapsed))
    ema.copy_to()
    _store_latent_statistics(vae, device)
    return vae.eval().requires_grad_(False)


def _state(
    model: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer], steps: int, elapsed: float
) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "steps": steps,
        "elapsed": elapsed,
    }


@torch.no_grad()
def _store_latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    latents = []
    for _ in range(24):
        clips = render(sample_scenes(TRAIN, 16, generator), generator=generator, device=device)
        latents.append(vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode())
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())


# ---------------------------------------------------------------- stage 2: text encoder and transformer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the vocabulary is the words of the world. Unknown words map to ``<unk>``."""
    words = sorted({w for s in SCENES for w in re.findall(r"\w+", s.caption)} | {","})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder, 64 wide."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """Eight Wan blocks, 192 wide, over 80 tokens of 1x2x2 latent cells."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * WIDTH,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.bias)
        model.scale_shift_table.zero_()
        for block in model.blocks:
            # Every branch starts silent but open: gates 1, output projections 0.
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, (2, 5)] = 1.0
            for projection in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                nn.init.zeros_(projection.weight)
    return model


class Joint(nn.Module):
    """Text encoder and transformer with a forward pass made for training: the same function as
    `WanTransformer3DModel.forward`, with the padding folded into one key and blocks that compile."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.block_forward: Callable[..., Tensor] = block_forward

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        """Predict noise - data [B, C, T, H, W]; `tokens` [B, L] ids, `padding` [B] zero tokens to pretend."""
        text, bias = self._text(tokens, padding)
        model = self.transformer
        cos, sin = model.rope(noisy)
        x = model.patch_embedding(noisy)
        _, _, t, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        temb, modulation, text, _ = model.condition_embedder(1000.0 * sigma, text)
        modulation = modulation.unflatten(1, (6, -1))
        cos, sin = cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()
        for block in model.blocks:
            x = self.block_forward(block, x, text, modulation, cos, sin, bias)
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        x = model.proj_out(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.view(len(x), t, h, w, 1, 2, 2, CHANNELS).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(noisy.shape)

    def _text(self, tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Text states [B, L + 1, D] and additive key bias [B, 1, 1, L + 1].

        WanPipeline pads the text with zero vectors to `max_sequence_length` and attends to them unmasked.
        One zero key with bias log(n) is the same as n of them, at the cost of one; drawing n at random makes
        the model work for every `max_sequence_length`.
        """
        shown = tokens != 0
        states = self.text_encoder(input_ids=tokens, attention_mask=shown.long()).last_hidden_state
        states = F.pad(states * shown.unsqueeze(-1), (0, 0, 0, 1))
        hidden = torch.zeros_like(states[..., 0]).masked_fill_(F.pad(~shown, (0, 1)), -1e4)
        hidden[:, -1] = padding.log()
        return states, hidden[:, None, None, :]


def block_forward(
    block: nn.Module, x: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, bias: Tensor
) -> Tensor:
    """One Wan block: modulated self-attention with rotary positions, cross-attention, feed-forward."""
    tables = (block.scale_shift_table + modulation).chunk(6, dim=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = tables
    width = x.shape[-1:]
    y = F.layer_norm(x, width, eps=1e-6) * (1 + scale1) + shift1
    x = x + _attention(block.attn1, y, y, None, cos, sin) * gate1
    y = F.layer_norm(x, width, block.norm2.weight, block.norm2.bias, eps=1e-6)
    x = x + _attention(block.attn2, y, text, bias, None, None)
    y = F.layer_norm(x, width, eps=1e-6) * (1 + scale2) + shift2
    y = F.gelu(block.ffn.net[0].proj(y), approximate="tanh")
    return x + block.ffn.net[2](y) * gate2


def _attention(
    attn: nn.Module, x: Tensor, source: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
    q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    # The CPU's bfloat16 attention has a backward pass seven times slower than its float32 one.
    kind = torch.float32 if x.device.type == "cpu" else v.dtype
    q, k, v = (part.transpose(1, 2).to(kind) for part in (q, k, v))
    with torch.autocast(x.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(kind))
    return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


# ---------------------------------------------------------------- stage 2: data


class LatentPool:
    """Normalised latents of rendered clips: filled once, then refreshed by a few fresh clips every step, so
    that the autoencoder costs a fraction of a training step and no clip is seen for long."""

    def __init__(self, vae: AutoencoderKLWan, size: int, device: torch.device, generator: torch.Generator) -> None:
        self.vae, self.device, self.generator = vae, device, generator
        self.latents = torch.empty(size, CHANNELS, 5, 8, 8, dtype=torch.float16)
        self.scenes: list[Scene] = []
        self._next = 0

    def refresh(self, count: int) -> None:
        """Render and encode `count` new clips, over the oldest ones once the pool is full."""
        scenes = sample_scenes(TRAIN, count, self.generator)
        latents = encode_scenes(self.vae, scenes, self.generator, self.device).half().cpu()
        for scene, latent in zip(scenes, latents, strict=True):
            slot = self._next % len(self.latents)
            self.latents[slot] = latent
            if slot < len(self.scenes):
                self.scenes[slot] = scene
            else:
                self.scenes.append(scene)
            self._next += 1

    def batch(self, count: int) -> tuple[Tensor, list[Scene]]:
        """`count` latents [B, 16, 5, 8, 8] and their scenes."""
        picks = torch.randint(len(self.scenes), (count,), generator=self.generator)
        return self.latents[picks].float().to(self.device), [self.scenes[i] for i in picks.tolist()]


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKLWan, scenes: Sequence[Scene], generator: torch.Generator, device: torch.device
) -> Tensor:
    """Render scenes and return their normalised latents [B, 16, 5, 8, 8]."""
    clips = render(scenes, generator=generator, device=device)
    latents = torch.cat([vae.encode(part.transpose(1, 2) * 2 - 1).latent_dist.mode() for part in clips.split(16)])
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def training_caption(scene: Scene, luck: float) -> str:
    """The caption, or now and then a shorter one: none at all (for guidance), or one phrase left out."""
    if luck < 0.10:
        return ""
    if luck < 0.14:
        return f"a {scene.colour} {scene.shape}, camera {scene.camera}"
    if luck < 0.18:
        return f"a {scene.colour} {scene.shape} {scene.motion}"
    return scene.caption


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1): mostly high ones, where motion and camera are decided.

    Stratified, so that a batch covers all levels evenly and the loss is less noisy.
    """
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    shift = torch.where(torch.rand(count, generator=generator) < 0.7, 4.0, 1.5)
    return (shift * u / (1 + (shift - 1) * u)).clamp(0.002, 0.9995)


def tokenise(tokenizer: PreTrainedTokenizerFast, captions: list[str], device: torch.device) -> Tensor:
    """Ids [B, 10]; ten tokens hold every caption of the world."""
    batch = tokenizer(captions, padding="max_length", max_length=10, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids.to(device)
    return ids


# ---------------------------------------------------------------- stage 2: training


@dataclass(slots=True)
class Run:
    """Everything stage 2 carries along."""

    options: TrainOptions
    vae: AutoencoderKLWan
    tokenizer: PreTrainedTokenizerFast
    joint: Joint
    ema: EMA
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator
    record: JsonLog
    clock: Clock
    steps: int = 0
    batch: int = 40
    history: list[float] = field(default_factory=list)

    def autocast(self) -> torch.autocast:
        """bfloat16 on CUDA and on CPUs that multiply it natively (twice the speed of float32 there)."""
        kind = self.options.device.type
        native = kind == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.autocast(kind, torch.bfloat16, enabled=native)


def _start(options: TrainOptions, vae: AutoencoderKLWan) -> Run:
    torch.manual_seed(options.seed + 2)
    tokenizer = build_tokenizer()
    joint = Joint(build_text_encoder(len(tokenizer)), build_transformer()).to(options.device)
    matrices, rest = split_parameters(joint.transformer.blocks, joint)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    ema = EMA(joint, decay=0.997)
    saved = load_checkpoint(options.work / "joint.pt") if options.resume else None
    steps, elapsed = 0, 0.0
    if saved:
        joint.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        steps, elapsed = saved["steps"], saved["elapsed"]
    joint.block_forward = torch.compile(block_forward, dynamic=False)
    return Run(
        options=options,
        vae=vae,
        tokenizer=tokenizer,
        joint=joint,
        ema=ema,
        optimizers=optimizers,
        generator=torch.Generator().manual_seed(options.seed + 3 + steps),
        record=JsonLog(options.work / "train.log"),
        clock=Clock(options.minutes * (1 - VAE_SHARE), elapsed),
        steps=steps,
        batch=40 if options.device.type == "cpu" else 256,
    )


def flow_loss(run: Run, latents: Tensor, captions: list[str], sigmas: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching error per clip [B]: (prediction - (noise - data))^2."""
    device = run.options.device
    tokens = tokenise(run.tokenizer, captions, device)
    padding = torch.exp(torch.rand(len(latents), generator=run.generator) * math.log(501.0)).to(device)
    level = sigmas.to(device).view(-1, 1, 1, 1, 1)
    with run.autocast():
        velocity = run.joint(torch.lerp(latents, noise, level), sigmas.to(device), tokens, padding)
    return (velocity.float() - (noise - latents)).square().flatten(1).mean(1)


def _train_step(run: Run, pool: LatentPool) -> float:
    latents, scenes = pool.batch(run.batch)
    luck = torch.rand(run.batch, generator=run.generator).tolist()
    captions = [training_caption(s, x) for s, x in zip(scenes, luck, strict=True)]
    noise = torch.randn(latents.shape, generator=run.generator).to(run.options.device)
    loss = flow_loss(run, latents, captions, draw_sigmas(run.batch, run.generator), noise).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(run.joint.parameters(), 1.0)
    for optimizer in run.optimizers:
        set_lr(optimizer, cosine(run.clock.fraction, warmup=0.01, floor=0.01))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.ema.update()
    run.steps += 1
    return loss.item()


def train_joint(options: TrainOptions, vae: AutoencoderKLWan) -> Run:
    """Stage 2: the averaged weights are in the returned run's modules."""
    run = _start(options, vae)
    cpu = options.device.type == "cpu"
    pool = LatentPool(vae, 16000, options.device, run.generator)
    for _ in range(64 if cpu else 128):
        pool.refresh(48)
    probed = scored = saved = run.clock.elapsed
    with progress_bar("transformer", run.clock) as tick:
        while not run.clock.done:
            if run.steps % 5 == 0:
                pool.refresh(40 if cpu else 256)
            run.history.append(_train_step(run, pool))
            tick(f"step {run.steps} loss {sum(run.history[-50:]) / len(run.history[-50:]):.4f}")
            now, total = run.clock.elapsed, run.clock.minutes
            if now - probed > max(0.5, 0.05 * total):
                probed = now
                probe(run)
            if now - scored > max(0.5, 0.10 * total):
                scored = now
                _interim(run)
            if now - saved > 2.0:
                saved = now
                _checkpoint(run)
    _checkpoint(run)
    run.ema.copy_to()
    return run


def _checkpoint(run: Run) -> None:
    state = _state(run.joint, run.ema, run.optimizers, run.steps, run.clock.elapsed)
    save_checkpoint(run.options.work / "joint.pt", state)


@torch.no_grad()
def probe(run: Run, count: int = 40) -> None:
    """Log how much a wrong word costs: loss with one attribute swapped minus loss with the true caption.

    It shows that a word is being learned long before samples do. Held-out captions, fixed clips and noise.
    """
    generator = torch.Generator().manual_seed(99)
    scenes = sample_scenes(HELD_OUT, count, generator)
    latents = encode_scenes(run.vae, scenes, generator, run.options.device)
    noise = torch.randn(latents.shape, generator=generator).to(run.options.device)
    swapped = {name: [_swap(s, name) for s in scenes] for name in ATTRIBUTES}
    levels: dict[str, dict[str, float]] = {}
    with run.ema.applied():
        for level in (0.97, 0.9, 0.7):
            sigmas = torch.full((count,), level)
            true = flow_loss(run, latents, [s.caption for s in scenes], sigmas, noise)
            levels[str(level)] = {"loss": float(true.mean())} | {
                name: float((flow_loss(run, latents, captions, sigmas, noise) - true).mean())
                for name, captions in swapped.items()
            }
    recent = run.history[-200:]
    run.record.write(
        stage="joint",
        minute=run.clock.elapsed,
        step=run.steps,
        loss=sum(recent) / max(1, len(recent)),
        probe=levels,
    )


def _swap(scene: Scene, name: str) -> str:
    words = ATTRIBUTES[name]
    other = words[(words.index(getattr(scene, name)) + 1) % len(words)]
    return replace(scene, **{name: other}).caption


# ---------------------------------------------------------------- export and score


def build_pipeline(run: Run) -> WanPipeline:
    """The modules as a plain diffusers WanPipeline."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    pipe = WanPipeline(
        tokenizer=run.tokenizer,
        text_encoder=run.joint.text_encoder,
        transformer=run.joint.transformer,
        vae=run.vae,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: WanPipeline,
    scenes: Sequence[Scene],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    batch: int = 20,
) -> Tensor:
    """Sample one clip per scene with the real pipeline: [B, F, 3, H, W] in [0, 1]. Clip i has seed + i."""
    clips = []
    for begin in range(0, len(scenes), batch):
        part = scenes[begin : begin + batch]
        out = pipe(
            prompt=[s.caption for s in part],
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))],
            max_sequence_length=32,
            output_type="pt",
        )
        clips.append(out.frames.float().cpu())
    return torch.cat(clips)


def contact_sheet(clips: Tensor, path: Path) -> None:
    """Save clips [B, F, 3, H, W] as one PNG, a row per clip."""
    from PIL import Image

    sheet = torch.cat([torch.cat(list(clip), dim=2) for clip in clips], dim=1)
    Image.fromarray((sheet.permute(1, 2, 0) * 255).byte().numpy()).save(path)


def _interim(run: Run, count: int = 20) -> None:
    """Sample some held-out captions with the averaged weights; log their scores and keep a contact sheet."""
    scenes = list(HELD_OUT[:count])
    with run.ema.applied():
        clips = sample(build_pipeline(run), scenes, steps=20)
    scores = score_clips(scenes, clips)
    contact_sheet(clips[:12], run.options.work / f"sheet-{run.clock.elapsed:05.1f}.png")
    run.record.write(
        stage="sample",
        minute=run.clock.elapsed,
        step=run.steps,
        n=count,
        **{k: v.accuracy for k, v in scores.attributes.items()},
        all=scores.everything.accuracy,
    )


def export(run: Run) -> None:
    """Write the pipeline in fp16 to `options.out`, in one rename."""
    built = run.options.work / "export"
    shutil.rmtree(built, ignore_errors=True)
    pipe = build_pipeline(run)
    pipe.save_pretrained(built, safe_serialization=True)
    # fp16 halves the download; the text encoder is tiny, and transformers would load it in the saved type.
    for name, module in (("transformer", run.joint.transformer), ("vae", run.vae)):
        copy.deepcopy(module).half().save_pretrained(built / name, safe_serialization=True)
    _name_tokenizer_portably(built)
    publish(built, run.options.out)


def _name_tokenizer_portably(folder: Path) -> None:
    """transformers 5 records a class name that transformers 4 lacks; this one exists in both."""
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")


def train(options: TrainOptions) -> None:
    """Train both stages, export, and score the exported folder on all held-out captions."""
    vae = train_vae(options)
    run = train_joint(options, vae)
    export(run)
    score_export(options)


def score_export(options: TrainOptions, *, steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 1000) -> Scores:
    """Load the exported folder like any user would, sample all held-out captions, write the model card."""
    pipe = WanPipeline.from_pretrained(options.out, local_files_only=True).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    clips = sample(pipe, HELD_OUT, steps=steps, guidance=guidance, seed=seed)
    scores = score_clips(HELD_OUT, clips)
    contact_sheet(clips[:12], options.work / "sheet-final.png")
    _write_card(options, scores, steps, guidance, seed)
    return scores


def _write_card(options: TrainOptions, scores: Scores, steps: int, guidance: float, seed: int) -> None:
    shutil.copyfile(options.work / "train.log", options.out / "train.log")
    log_lines = [json.loads(line) for line in (options.work / "train.log").read_text().splitlines()]
    stages = {stage: [r for r in log_lines if r["stage"] == stage] for stage in ("vae", "joint")}
    weights = {p.parent.name: p.stat().st_size for p in sorted(options.out.rglob("*.safetensors"))}
    card = {
        "name": options.name,
        "pipeline": "WanPipeline",
        "prompts": "the 450 captions of diffeff.zoo.world; trained on TRAIN, scored on HELD_OUT",
        "call": {
            "height": SIZE,
            "width": SIZE,
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        },
        "scores": scores.to_json(),
        "scored": {"captions": len(HELD_OUT), "seeds": f"{seed} + index", "date": _today()},
        "training": {
            "device": str(options.device),
            "minutes": {stage: records[-1]["minute"] for stage, records in stages.items() if records},
            "steps": {stage: records[-1]["step"] for stage, records in stages.items() if records},
            "seed": options.seed,
            "vae_psnr_db": stages["vae"][-1]["psnr"] if stages["vae"] else None,
        },
        "weights_bytes": weights,
    }
    write_card(options.out, card, _readme(card, scores))


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _readme(card: dict[str, Any], scores: Scores) -> str:
    call, training = card["call"], card["training"]
    total = sum(card["weights_bytes"].values()) / 1e6
    return README.format(
        table=score_table(scores),
        captions=card["scored"]["captions"],
        seeds=card["scored"]["seeds"],
        date=card["scored"]["date"],
        steps=call["num_inference_steps"],
        guidance=call["guidance_scale"],
        vae_minutes=training["minutes"].get("vae", 0.0),
        joint_minutes=training["minutes"].get("joint", 0.0),
        vae_steps=training["steps"].get("vae", 0),
        joint_steps=training["steps"].get("joint", 0),
        device=training["device"],
        psnr=training["vae_psnr_db"],
        megabytes=total,
    )


README = """\
# sprites-wan

A small text-to-video pipeline in the Wan format: 9 frames of 64x64, {megabytes:.1f} MB of weights, trained from
scratch on a procedural world (`diffeff.zoo.world`). It exists to test acceleration methods on a model whose
output can be measured exactly.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/to/sprites-wan")
video = pipe(
    "a red circle moving left, camera pans right",
    height=64, width=64, num_frames=9, num_inference_steps={steps}, guidance_scale={guidance},
).frames[0]
```

Captions read `a COLOUR SHAPE MOTION, camera CAMERA`: red yellow green cyan blue magenta; circle triangle cross;
standing still, moving left / right / up / down; static, pans left / right, zooms in / out. There are 450 of
them; 250 were trained on. Object and camera move independently, the object in screen coordinates.

## Measured

All {captions} held-out captions, one clip each, {steps} steps (UniPC), guidance {guidance}, seeds {seeds}, {date}.
Attributes are read back from the pixels by `diffeff.zoo.measure`, which contains no network.

{table}

## How it was trained

- `python -m diffeff.zoo.train sprites-wan` on `{device}`; the same command runs on CUDA.
- Autoencoder, {vae_minutes:.0f} minutes, {vae_steps} steps: squared and absolute error, outline of the object weighted
  up, Muon + AdamW; {psnr:.1f} dB on clips it has not seen.
- UMT5 text encoder and Wan transformer together, {joint_minutes:.0f} minutes, {joint_steps} steps of 40 clips: flow
  matching with most noise levels high, freshly rendered clips throughout, 10 % empty captions, Muon + AdamW with
  a cosine schedule over the clock, averaged weights.
- `train.log` has the curve, `card.json` these numbers.

## Limits

It knows 27 words and nothing else; other words are read as unknown. Sizes, lengths and aspect ratios other than
9 frames of 64x64 were not trained. The autoencoder blurs the floor slightly.
"""
