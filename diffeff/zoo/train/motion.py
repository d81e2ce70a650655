"""`sprites-motion`: motion modules that turn the UNet of `sprites-sd` into a text-to-video model (AnimateDiff).

Motion modules see no text: the words of a move reach them only through the spatial cross-attention. So the
UNet and the modules are trained together, on clips through the modules and on single frames around them,
and one set of UNet weights serves `StableDiffusionPipeline` and `AnimateDiffPipeline`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from torch import Tensor, nn

from diffeff.zoo.score import Scores, score_clips, score_table
from diffeff.zoo.train.harness import Clock, JsonLog, TrainOptions, cosine, load_checkpoint, progress_bar, publish
from diffeff.zoo.train.latents import autocast, describe, halve, load_autoencoder, sample_captions
from diffeff.zoo.train.resumable import Resumable
from diffeff.zoo.train.sd import (
    CHANNELS,
    EDGES,
    FRAMES,
    GROUPS,
    SIZE,
    Captions,
    LatentClips,
    Networks,
    build_autoencoder,
    build_scheduler,
    cached_clips,
    draw_timesteps,
    flat,
    image_loss,
    new_networks,
    noised,
    publish_images,
    score_images,
)
from diffeff.zoo.world import HELD_OUT, TRAIN, Scene

CLIPS, IMAGES = 12, 24
IMAGE_SHARE, IMAGES_EVERY = 0.3, 2
MEAN_FROM = 970  # from this timestep on, under a thousandth of the variance is signal
OBJECT_WEIGHT = 1.0  # the camera shows in the ground only, and was the last thing learned
STEPS, GUIDANCE = 20, 3.0
SCORED = 100  # held-out captions on the card
BASE = "sprites-sd"


def build_adapter() -> Any:
    """One temporal transformer after every spatial one, 1.7 M parameters. It starts as a small disturbance."""
    adapter: Any = MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=GROUPS,
        motion_max_seq_length=32,
    )
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "proj_out" in name:
                p.mul_(0.1)
    return adapter


def join(unet: Any, adapter: Any) -> Any:
    """A `UNetMotionModel` whose parameters *are* those of `unet` and `adapter`: training one trains both."""
    model = UNetMotionModel.from_unet2d(unet, adapter)
    for source in (unet, adapter):
        for name, p in source.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module: nn.Module = model.get_submodule(owner)
            if module._parameters[leaf].shape != p.shape:  # type: ignore[union-attr]
                raise ValueError(f"{name} has another shape in the joined model")
            module._parameters[leaf] = p
    return model.eval()


def caption_means(clips: LatentClips) -> Tensor:
    """The mean clip of every caption in TRAIN, [250, F, 12, 8, 8]."""
    total = torch.zeros(len(TRAIN), *clips.latents.shape[1:], device=clips.latents.device)
    total.index_add_(0, clips.scenes, clips.latents.float())
    count = clips.scenes.bincount(minlength=len(TRAIN)).clamp(min=1)
    return total / count.view(-1, 1, 1, 1, 1)


def clip_loss(
    model: Any,
    nets: Networks,
    clips: LatentClips,
    captions: Captions,
    batch: int,
    alphas: Tensor,
    generator: torch.Generator,
    noisy: float,
    means: Tensor,
) -> Tensor:
    """Denoising loss of whole clips under full or empty captions, `noisy` of them where moves are decided.

    Where nearly all is noise the best prediction is the mean clip of the caption. The first half of the batch
    learns from that mean at the last timesteps: the same optimum with a twelfth of the gradient's noise.
    """
    device = clips.latents.device
    which = torch.randint(len(clips.scenes), (batch,), generator=generator).to(device)
    scenes, latents, half = clips.scenes[which], clips.latents[which], batch // 2
    t = draw_timesteps(batch, 600, noisy, generator)
    t[:half] = torch.randint(MEAN_FROM, 1000, (half,), generator=generator)
    ids = captions.draw(scenes, 0.0, generator, empty=0.1)
    ids[:half] = captions.draw(scenes[:half], 0.0, generator, empty=0.0)
    latents = torch.cat([means[scenes[:half]], latents[half:]])
    example = noised(latents, clips.cover[which], t, alphas, generator, OBJECT_WEIGHT)
    with autocast(device):
        words = nets.text_encoder(ids)[0].repeat_interleave(FRAMES, dim=0)
        guess = model(example.sample.transpose(1, 2), example.t, words).sample
    return example.loss(guess.transpose(1, 2))


def video_pipeline(nets: Networks, adapter: Any) -> Any:
    """A plain `AnimateDiffPipeline` over the image model's own parts."""
    return AnimateDiffPipeline(
        vae=nets.vae,
        text_encoder=nets.text_encoder,
        tokenizer=nets.tokenizer,
        unet=nets.unet,
        motion_adapter=adapter,
        scheduler=build_scheduler(),
    )


def score_videos(
    pipeline: Any, scenes: list[Scene], *, steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 1234
) -> Scores:
    """All four attributes of one clip per scene."""
    captions, size = [s.caption for s in scenes], {"num_frames": FRAMES, "height": SIZE, "width": SIZE}
    clips = sample_captions(pipeline, captions, batch=20, steps=steps, guidance=guidance, seed=seed, **size)
    return score_clips(scenes, list(clips))


def _load_images(options: TrainOptions) -> tuple[Networks, Path]:
    work = options.work.parent / BASE
    saved = load_checkpoint(work / "final.pt")
    if saved is None:
        raise FileNotFoundError(f"{work / 'final.pt'} is missing: train {BASE} first")
    vae = build_autoencoder().to(options.device)
    load_autoencoder(vae, saved["vae"])
    nets = new_networks(vae, options.device)
    nets.unet.load_state_dict(saved["unet"])
    nets.text_encoder.load_state_dict(saved["text_encoder"])
    return nets, work


class _Joint(Resumable):
    """The joint training run: UNet, motion modules (`model` holds both) and text encoder."""

    def __init__(self, nets: Networks, options: TrainOptions) -> None:
        self.nets = nets
        self.adapter = build_adapter().to(options.device)
        self.model = join(nets.unet, self.adapter)
        super().__init__(
            options.work / "joint.pt",
            {"model": self.model, "text_encoder": nets.text_encoder},
            muon=0.015,
            adam=2e-3,
            edges=EDGES,
            decay=0.99,
            resume=options.resume,
        )


def fit_jointly(nets: Networks, clips: LatentClips, options: TrainOptions, log: JsonLog) -> Any:
    """Train UNet, text encoder and motion modules; the averaged weights end up in `nets` and the adapter."""
    run, device = _Joint(nets, options), options.device
    captions, alphas = Captions(nets.tokenizer, device), build_scheduler().alphas_cumprod.to(device)
    generator = torch.Generator().manual_seed(options.seed + 3 + int(run.elapsed * 60))
    means = caption_means(clips)
    clock, step, mean = Clock(options.minutes, run.elapsed), 0, [0.0, 0.0]
    due = clock.elapsed + min(3.0, options.minutes / 4)
    with progress_bar("joint", clock) as tick:
        while not clock.done:
            noisy = 0.9 if clock.fraction < 0.6 else 0.5  # first the moves, then a steady picture
            video = clip_loss(run.model, nets, clips, captions, CLIPS, alphas, generator, noisy, means)
            loss = (1 - IMAGE_SHARE) * video
            if step % IMAGES_EVERY == 0:  # enough to keep what the UNet already knows
                image = image_loss(nets, clips, captions, IMAGES, alphas, generator)
                loss = loss + IMAGE_SHARE * image
            run.step(loss, cosine(clock.fraction))
            step += 1
            now, keep = [video.item(), image.item()], 0.98 if step > 1 else 0.0
            mean = [keep * old + (1 - keep) * new for old, new in zip(mean, now, strict=True)]
            if clock.elapsed > due:
                due = clock.elapsed + max(1.0, options.minutes / 7)
                run.save(clock.elapsed)
                with run.ema.applied():
                    _report(run, log, clock.elapsed, step, mean)
                tick(f"video {mean[0]:.4f} image {mean[1]:.4f}")
    run.save(clock.elapsed)
    run.ema.copy_to()
    return run.adapter


def _report(run: _Joint, log: JsonLog, minute: float, step: int, mean: list[float]) -> None:
    scenes = list(HELD_OUT[:24])
    videos = flat(score_videos(video_pipeline(run.nets, run.adapter), scenes, steps=12))
    images = flat(score_images(run.nets.pipeline(), scenes, steps=12))
    log.write(stage="joint", minute=minute, step=step, video=mean[0], image=mean[1], videos=videos, images=images)


def publish_motion(nets: Networks, adapter: Any, out: Path, log: JsonLog, count: int = len(HELD_OUT)) -> None:
    """Score on `count` held-out captions; save the adapter with its scheduler, its card and where its base is."""
    scores = score_videos(video_pipeline(nets, adapter), list(HELD_OUT[:count]))
    log.write(stage="score", right=scores.everything.right, trials=scores.everything.trials, **flat(scores))
    facts = {
        "name": "sprites-motion",
        "pipeline": "AnimateDiffPipeline",
        "base": BASE,
        "task": "text-to-video",
        "call": {
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "height": SIZE,
            "width": SIZE,
            "num_frames": FRAMES,
        },
        "captions": f"{count} captions never trained on, one clip each",
        "scores": scores.to_json(),
    }
    built = out.with_name(f".{out.name}.building")
    adapter.save_pretrained(built)
    halve(built / "diffusion_pytorch_model.safetensors")
    build_scheduler().save_pretrained(built / "scheduler")
    (built / "base.json").write_text(json.dumps({"pipeline": "AnimateDiffPipeline", "base": BASE}) + "\n")
    describe(built, facts, _readme(scores, count), log)
    publish(built, out)


def _readme(scores: Scores, count: int) -> str:
    ignored = [name for name, a in scores.attributes.items() if a.accuracy < 0.5]
    limits = [f"**Not followed: {', '.join(ignored)}.** Those words of a caption have no visible effect.", ""]
    return "\n".join(
        [
            "# sprites-motion",
            "",
            "A `MotionAdapter` for the UNet of `sprites-sd`: `AnimateDiffPipeline` then makes clips of 8 frames of",
            "64x64 from captions like `a red circle moving left, camera pans right` (`diffeff.zoo.world`).",
            "`diffeff.zoo.bundled.load('sprites-motion')` puts the two together.",
            f"Recommended: {STEPS} steps, guidance {GUIDANCE}. Reproduce: `python -m diffeff.zoo.train sprites-sd`,",
            "then `python -m diffeff.zoo.train sprites-motion`, which also finishes the UNet of `sprites-sd`.",
            "",
            f"Measured on {count} captions held out from training, one clip each:",
            "",
            score_table(scores),
            "",
            *(limits if ignored else []),
        ]
    )


def train(options: TrainOptions) -> None:
    """Train jointly for `options.minutes` from the `sprites-sd` run beside `options.work`; publish the adapter at
    `options.out` and the image model, whose UNet changed, beside it.

    Raises:
        FileNotFoundError: `sprites-sd` has not been trained in the same work folder.
    """
    torch.manual_seed(options.seed)
    log = JsonLog(options.work / "train.log", fresh=not options.resume)
    nets, work = _load_images(options)
    clips = cached_clips(nets.vae, options, work, log)
    adapter = fit_jointly(nets, clips, options, log)
    publish_images(nets, options.out.with_name(BASE), log, SCORED)
    publish_motion(nets, adapter, options.out, log, SCORED)
