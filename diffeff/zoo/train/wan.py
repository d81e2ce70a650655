"""Train `sprites-wan`: a text-to-video pipeline in the Wan format, small enough for one CPU core.

Stage 1 (`wan_codec`) trains the autoencoder. Stage 2 trains text encoder and transformer together on latents
of freshly rendered clips, by flow matching. Both follow the clock and can be interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
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
    split_parameters,
    state_of,
)
from diffeff.zoo.train.wan_codec import CHANNELS, Vae, encode_scenes, train_vae
from diffeff.zoo.train.wan_export import build_pipeline, contact_sheet, export, sample, score_export
from diffeff.zoo.train.wan_model import (
    Joint,
    WordTokenizer,
    block_forward,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    tokenise,
)
from diffeff.zoo.world import ATTRIBUTES, HELD_OUT, TRAIN, Scene, sample_scenes

VAE_SHARE = 0.11  # of the wall-clock budget


class LatentPool:
    """Normalised latents of rendered clips: filled once, then refreshed by a few fresh clips every step, so
    that the autoencoder costs a fraction of a training step and no clip is seen for long."""

    def __init__(self, vae: Vae, size: int, device: torch.device, generator: torch.Generator) -> None:
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


@dataclass(slots=True)
class Run:
    """Everything stage 2 carries along."""

    options: TrainOptions
    vae: Vae
    tokenizer: WordTokenizer
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


def _start(options: TrainOptions, vae: Vae) -> Run:
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
    error: Tensor = velocity.float() - (noise - latents)
    return error.square().flatten(1).mean(1)


def _train_step(run: Run, pool: LatentPool) -> float:
    latents, scenes = pool.batch(run.batch)
    luck = torch.rand(run.batch, generator=run.generator).tolist()
    captions = [training_caption(s, x) for s, x in zip(scenes, luck, strict=True)]
    noise = torch.randn(latents.shape, generator=run.generator).to(run.options.device)
    loss = flow_loss(run, latents, captions, draw_sigmas(run.batch, run.generator), noise).mean()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(run.joint.parameters(), 1.0)
    for optimizer in run.optimizers:
        set_lr(optimizer, cosine(run.clock.fraction, warmup=0.01, floor=0.01))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.ema.update()
    run.steps += 1
    return loss.item()


def train_joint(options: TrainOptions, vae: Vae, keep: Collection[int] = ()) -> Run:
    """Stage 2: the averaged weights are in the returned run's modules.

    After each number of steps in `keep` they are also saved, as `step-000100.pt` in the work folder.
    """
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
            if run.steps in keep:
                _keep(run)
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
    state = state_of(run.joint, run.ema, run.optimizers, run.steps, run.clock.elapsed)
    save_checkpoint(run.options.work / "joint.pt", state)


def _keep(run: Run) -> None:
    with run.ema.applied():
        save_checkpoint(run.options.work / f"step-{run.steps:06d}.pt", run.joint.state_dict())


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


def _interim(run: Run, count: int = 20) -> None:
    """Sample some held-out captions with the averaged weights; log their scores and keep a contact sheet."""
    scenes = list(HELD_OUT[:count])
    with run.ema.applied():
        clips = sample(build_pipeline(run.tokenizer, run.joint, run.vae), scenes, steps=20)
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


def train(options: TrainOptions) -> None:
    """Train both stages, export, and score the exported folder on all held-out captions."""
    vae = train_vae(options, options.minutes * VAE_SHARE)
    run = train_joint(options, vae)
    export(build_pipeline(run.tokenizer, run.joint, run.vae), options)
    score_export(options)
