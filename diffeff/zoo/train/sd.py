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
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from diffeff.zoo.score import Scores, score_clips, score_table
from diffeff.zoo.train.harness import (
    Clock,
    JsonLog,
    TrainOptions,
    cosine,
    load_checkpoint,
    progress_bar,
    save_checkpoint,
)
from diffeff.zoo.train.latents import (
    autocast,
    describe,
    encode,
    keep_autoencoder,
    kept_autoencoder,
    precondition,
    psnr,
    sample_captions,
    save_half,
    train_autoencoder,
)
from diffeff.zoo.train.resumable import Resumable
from diffeff.zoo.train.text import WIDTH, build_text_encoder, build_tokenizer, token_ids
from diffeff.zoo.world import HELD_OUT, TRAIN, Scene, render, sample_scenes

SIZE, FRAMES = 64, 8
LATENT_CHANNELS, CELL = 12, 8
CHANNELS, GROUPS = (80, 96, 80), 16
VAE_SHARE = 0.32
CACHE_CLIPS = 3000
BATCH = 96
OBJECT_WEIGHT = 4.0
STEPS, GUIDANCE = 20, 2.0
#: Layers at the rim of the networks and tables, which are trained with AdamW.
EDGES = ("conv_in", "conv_out", "embedding", "time_emb")


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
    if kept_autoencoder(vae, options):
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

    train_autoencoder(vae, draw, validate, minutes=minutes, log=log, device=options.device, muon=0.03, adam=3e-3)
    precondition(vae, frames.pool[torch.randperm(len(frames.pool), generator=generator)[:1000]].float() / 127.5 - 1)
    log.write(stage="vae preconditioned", **validate(vae))
    keep_autoencoder(vae, options)
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


def build_unet() -> Any:
    """Three resolutions (8, 4, 2), self- and cross-attention in each."""
    return UNet2DConditionModel(
        sample_size=SIZE // CELL,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=tuple(width // 16 for width in CHANNELS),  # diffusers' name for the number of heads
        norm_num_groups=GROUPS,
    )


def build_scheduler() -> Any:
    """DDIM with v-prediction. The last training step carries no signal at all: motion and layout are decided
    near pure noise, and sampling starts there."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


@dataclass(frozen=True, slots=True)
class LatentClips:
    """`latents` [N, F, 12, 8, 8], `cover` [N, F, 1, 8, 8] the share of each cell that the object covers,
    `scenes` [N] as indices into TRAIN."""

    latents: Tensor
    cover: Tensor
    scenes: Tensor

    def to(self, device: torch.device) -> LatentClips:
        """On a device."""
        return LatentClips(self.latents.to(device), self.cover.to(device), self.scenes.to(device))


@torch.no_grad()
def encode_clips(vae: Any, count: int, seed: int) -> LatentClips:
    """Render and encode `count` clips of captions in TRAIN; about 20 clips/s on one CPU core."""
    generator = torch.Generator().manual_seed(seed)
    latents, covers, picks = [], [], []
    for begin in range(0, count, 25):
        pick = torch.randint(len(TRAIN), (min(25, count - begin),), generator=generator)
        scenes = [TRAIN[i] for i in pick.tolist()]
        clips = render(scenes, frames=FRAMES, size=SIZE, generator=generator).flatten(0, 1)
        latents.append(encode(vae, clips * 2 - 1).cpu().half().unflatten(0, (-1, FRAMES)))
        covers.append(F.avg_pool2d(object_cover(clips), CELL).half().unflatten(0, (-1, FRAMES)))
        picks.append(pick)
    return LatentClips(torch.cat(latents), torch.cat(covers), torch.cat(picks))


def cached_clips(vae: Any, options: TrainOptions, work: Path, log: JsonLog) -> LatentClips:
    """The training set, encoded once."""
    path = work / "latents.pt"
    saved = load_checkpoint(path) if options.resume else None
    if saved is None:
        clips = encode_clips(vae, CACHE_CLIPS, options.seed + 1)
        saved = {"latents": clips.latents, "cover": clips.cover, "scenes": clips.scenes}
        save_checkpoint(path, saved)
        log.write(stage="encoded", clips=CACHE_CLIPS, std=float(clips.latents.float().std()))
    return LatentClips(**saved).to(options.device)


class Captions:
    """Token ids of every caption of TRAIN: in full, as one frame shows it, and the empty one."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        full = [scene.caption for scene in TRAIN]
        still = [scene.still_caption for scene in TRAIN]
        self._ids = token_ids(tokenizer, [*full, *still, ""]).to(device)

    def draw(self, scenes: Tensor, still: float, generator: torch.Generator, empty: float = 0.1) -> Tensor:
        """Ids [B, L] for scene indices [B]: short with probability `still`, empty with `empty`."""
        chance = torch.rand(len(scenes), generator=generator).to(scenes.device)
        rows = torch.where(chance < empty + still, scenes + len(TRAIN), scenes)
        return self._ids[torch.where(chance < empty, 2 * len(TRAIN), rows)]


def draw_timesteps(count: int, low: int, share: float, generator: torch.Generator) -> Tensor:
    """`share` of the timesteps from [low, 1000), where layout and motion are decided; the others from all."""
    high = torch.randint(low, 1000, (count,), generator=generator)
    every = torch.randint(0, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < share, high, every)


@dataclass(frozen=True, slots=True)
class Noised:
    """A training example: the noised latents, their timesteps, the velocity to predict, the cells' weights."""

    sample: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor

    def loss(self, prediction: Tensor) -> Tensor:
        """Weighted mean square; weighting cells does not move the optimum, only the order of learning."""
        return (self.weight * (prediction.float() - self.target).square()).mean() / self.weight.mean()


def noised(
    latents: Tensor,
    cover: Tensor,
    t: Tensor,
    alphas: Tensor,
    generator: torch.Generator,
    object_weight: float = OBJECT_WEIGHT,
) -> Noised:
    """Noise latents [B, ...] to timesteps [B]; cells that hold the object weigh `object_weight` more."""
    latents = latents.float()
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    t = t.to(latents.device)
    a = alphas[t].view(-1, *[1] * (latents.ndim - 1))
    sample = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * latents
    return Noised(sample, t, target, 1 + object_weight * cover.float())


@dataclass(frozen=True, slots=True)
class Networks:
    """What is trained and what is needed to make a pipeline of it."""

    vae: Any
    tokenizer: Any
    text_encoder: Any
    unet: Any

    def pipeline(self) -> Any:
        """A plain `StableDiffusionPipeline`."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def image_loss(
    nets: Networks, clips: LatentClips, captions: Captions, batch: int, alphas: Tensor, generator: torch.Generator
) -> Tensor:
    """Denoising loss of single frames under full, short and empty captions."""
    device = clips.latents.device
    which = torch.randint(len(clips.scenes), (batch,), generator=generator).to(device)
    frame = torch.randint(FRAMES, (batch,), generator=generator).to(device)
    t = draw_timesteps(batch, 350, 0.6, generator)
    example = noised(clips.latents[which, frame], clips.cover[which, frame], t, alphas, generator)
    ids = captions.draw(clips.scenes[which], 0.4, generator)
    with autocast(device):
        words = nets.text_encoder(ids)[0]
        return example.loss(nets.unet(example.sample, example.t, words).sample)


def score_images(
    pipeline: Any, scenes: list[Scene], *, steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 1234
) -> Scores:
    """Colour and shape of one image per scene, asked for by its full caption."""
    captions = [s.caption for s in scenes]
    images = sample_captions(pipeline, captions, batch=50, steps=steps, guidance=guidance, seed=seed)
    return score_clips(scenes, list(images))


def flat(scores: Scores) -> dict[str, float]:
    """Accuracies for the log."""
    return {**{k: a.accuracy for k, a in scores.attributes.items()}, "all": scores.everything.accuracy}


def fit_unet(nets: Networks, clips: LatentClips, options: TrainOptions, log: JsonLog, minutes: float) -> None:
    """Train UNet and text encoder on single frames; leaves the averaged weights in them."""
    trained = {"unet": nets.unet, "text_encoder": nets.text_encoder}
    run = Resumable(
        options.work / "unet.pt", trained, muon=0.02, adam=3e-3, edges=EDGES, decay=0.995, resume=options.resume
    )
    captions = Captions(nets.tokenizer, options.device)
    alphas = build_scheduler().alphas_cumprod.to(options.device)
    generator = torch.Generator().manual_seed(options.seed + 2)
    clock, step, running = Clock(minutes, run.elapsed), 0, 0.0
    due = clock.elapsed + 1.0
    with progress_bar("unet", clock) as tick:
        while not clock.done:
            loss = image_loss(nets, clips, captions, BATCH, alphas, generator)
            run.step(loss, cosine(clock.fraction, floor=0.1))
            step += 1
            running += 0.02 * (loss.item() - running) if step > 1 else loss.item()
            if clock.elapsed > due:
                due = clock.elapsed + max(1.0, minutes / 8)
                with run.ema.applied():
                    figures = flat(score_images(nets.pipeline(), list(HELD_OUT[:50]), steps=15))
                log.write(stage="unet", minute=clock.elapsed, step=step, loss=running, **figures)
                tick(f"loss {running:.4f} " + " ".join(f"{k} {v:.2f}" for k, v in figures.items()))
                run.save(clock.elapsed)
    run.ema.copy_to()


def new_networks(vae: Any, device: torch.device) -> Networks:
    """Untrained text encoder and UNet around a trained autoencoder."""
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer).to(device)
    return Networks(vae.eval(), tokenizer, text_encoder.eval(), build_unet().to(device).eval())


def train(options: TrainOptions) -> None:
    """Train autoencoder, text encoder and UNet within `options.minutes` and publish them at `options.out`."""
    torch.manual_seed(options.seed)
    log = JsonLog(options.work / "train.log", fresh=not options.resume)
    vae = fit_autoencoder(options, log, VAE_SHARE * options.minutes)
    clips = cached_clips(vae, options, options.work, log)
    nets = new_networks(vae, options.device)
    fit_unet(nets, clips, options, log, (1 - VAE_SHARE) * options.minutes)
    state = {"vae": vae.state_dict(), "unet": nets.unet.state_dict(), "text_encoder": nets.text_encoder.state_dict()}
    save_checkpoint(options.work / "final.pt", state)
    publish_images(nets, options.out, log)


def publish_images(nets: Networks, out: Path, log: JsonLog, count: int = len(HELD_OUT)) -> None:
    """Score the pipeline on `count` held-out captions and save it with its card."""
    scores = score_images(nets.pipeline(), list(HELD_OUT[:count]))
    log.write(stage="score", right=scores.everything.right, trials=scores.everything.trials, **flat(scores))
    facts = {
        "name": "sprites-sd",
        "pipeline": "StableDiffusionPipeline",
        "task": "text-to-image",
        "call": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIZE, "width": SIZE},
        "captions": f"{count} captions never trained on, one image each",
        "scores": scores.to_json(),
    }

    save_half(nets.pipeline(), out, lambda folder: describe(folder, facts, _readme(scores), log))


def _readme(scores: Scores) -> str:
    return "\n".join(
        [
            "# sprites-sd",
            "",
            "Text-to-image in Stable Diffusion's format, 64x64, trained on the procedural world of",
            "`diffeff.zoo.world`. Ask for `a red circle` or `a red circle moving left, camera pans right`;",
            "colours, shapes and moves are the words of that module. `sprites-motion` makes clips with this UNet.",
            f"Recommended: {STEPS} steps, guidance {GUIDANCE}. Reproduce: `python -m diffeff.zoo.train sprites-sd`,",
            "then `python -m diffeff.zoo.train sprites-motion`, which trains the UNet further on clips and images.",
            "",
            f"Measured on {scores.everything.trials} captions held out from training, one image each:",
            "",
            score_table(scores),
        ]
    )
