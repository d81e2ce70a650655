"""Train `sprites-encoder`: features of frames and clips of the world, and one space for them and for captions.

The features have to notice quality, so nothing teaches them to ignore it: beside the words of the caption they are
asked for what was drawn (position, size, camera) and for how much each clip was spoilt, by linear heads on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffeff.zoo.degrade import FRAME_KINDS, KINDS
from diffeff.zoo.encoder import EncoderConfig, SpritesEncoder, word_ids
from diffeff.zoo.train.encoder_batch import CLIP_TRUTH, FRAME_TRUTH, GROUP, GROUPS, Batch, draw_batch
from diffeff.zoo.train.encoder_export import export, labels, read_words
from diffeff.zoo.train.harness import (
    EMA,
    Clock,
    JsonLog,
    TrainOptions,
    cosine,
    load_checkpoint,
    progress_bar,
    save_checkpoint,
)
from diffeff.zoo.train.latents import Optimisers
from diffeff.zoo.world import ATTRIBUTES, COLOURS, HELD_OUT, SHAPES, TRAIN, Scene

#: Layers that stay with AdamW: those at the rim of the network.
EDGES = ("stem", "filters", "features", "embed", "table", "texts")
#: The sharpness of the choice between captions: a cosine that is 1 / SHARPNESS higher is e times as likely.
SHARPNESS = 15.0
_TEST_GROUPS = 2 * GROUPS


def build_encoder(seed: int = 0) -> SpritesEncoder:
    """The untrained network, with the words of the world."""
    torch.manual_seed(seed)
    words = {word for phrases in ATTRIBUTES.values() for phrase in phrases for word in phrase.split()}
    return SpritesEncoder(EncoderConfig(words=(",", "a", "camera", *sorted(words))))


class Heads(nn.Module):
    """Linear readings of the features, thrown away after training: words, truth, and spoilt how much."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.frame_words = nn.ModuleList(nn.Linear(config.frame_dim, len(w)) for w in (COLOURS, SHAPES))
        self.clip_words = nn.ModuleList(nn.Linear(config.clip_dim, len(w)) for w in ATTRIBUTES.values())
        self.frame_truth = nn.Linear(config.frame_dim, FRAME_TRUTH)
        self.clip_truth = nn.Linear(config.clip_dim, CLIP_TRUTH)
        self.frame_spoilt = nn.Linear(config.frame_dim, len(FRAME_KINDS))
        self.clip_spoilt = nn.Linear(config.clip_dim, len(KINDS))


def _words_loss(heads: nn.ModuleList, features: Tensor, wanted: Tensor, trust: Tensor) -> Tensor:
    losses = [F.cross_entropy(head(features), w, reduction="none") for head, w in zip(heads, wanted, strict=False)]
    return torch.stack([(loss * trust).mean() for loss in losses]).sum()


def features_loss(heads: Heads, batch: Batch, frames: Tensor, clips: Tensor) -> Tensor:
    """What the features [B * F, frame_dim] and [B, clip_dim] fail to tell."""
    wanted, repeats = labels(batch.scenes), batch.clips.shape[1]
    told = _words_loss(heads.clip_words, clips, wanted, batch.trust)
    told = told + _words_loss(
        heads.frame_words, frames, wanted[:2].repeat_interleave(repeats, 1), batch.trust.repeat_interleave(repeats)
    )
    trust = batch.trust.view(-1, 1)
    # Frames out of order or repeated do not show the place their time says.
    whole = trust * (batch.spoilt[:, len(FRAME_KINDS) :].amax(1, keepdim=True) == 0)
    place = whole.unsqueeze(1) * (heads.frame_truth(frames).view(batch.frame_truth.shape) - batch.frame_truth).square()
    course = whole * (heads.clip_truth(clips) - batch.clip_truth).square()
    seen = batch.spoilt[:, : len(FRAME_KINDS)].repeat_interleave(repeats, 0)
    quality = (heads.frame_spoilt(frames) - seen).square().mean() + (
        heads.clip_spoilt(clips) - batch.spoilt
    ).square().mean()
    loss: Tensor = 0.3 * told + place.mean() + course.mean() + 10.0 * quality
    return loss


class Captions:
    """Word ids of every caption of TRAIN and of every pair of colour and shape."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.full = word_ids([s.caption for s in TRAIN], words)[0]
        self.index = {scene: i for i, scene in enumerate(TRAIN)}
        self.pairs = list(product(COLOURS, SHAPES))

    def stills(self, generator: torch.Generator) -> Tensor:
        """One text for each pair: `a red circle`, or a caption with any motion and camera."""
        motions, cameras = ATTRIBUTES["motion"], ATTRIBUTES["camera"]
        picks = torch.randint(2 * len(motions) * len(cameras), (len(self.pairs),), generator=generator).tolist()
        texts = []
        for (colour, shape), pick in zip(self.pairs, picks, strict=True):
            scene = Scene(colour, shape, motions[pick % 5], cameras[pick // 5 % 5])
            texts.append(scene.caption if pick % 2 else scene.still_caption)
        return word_ids(texts, self.words)[0]


def _blank(ids: Tensor, generator: torch.Generator, share: float = 0.02) -> Tensor:
    """Now and then a word that is not known, so that one does not confuse the rest."""
    lost = (torch.rand(ids.shape, generator=generator) < share) & (ids > 1)
    return ids.masked_fill(lost, 1)


def _choice(pictures: Tensor, texts: Tensor, right: Tensor, trust: Tensor) -> Tensor:
    """Which text goes with which picture, and which picture with which text."""
    logits = SHARPNESS * F.normalize(pictures, dim=1) @ F.normalize(texts, dim=1).T
    by_picture = (F.cross_entropy(logits, right, reduction="none") * trust).mean()
    shown, mine = right.unique(return_inverse=True)
    share = F.one_hot(mine, len(shown)).T * trust
    by_text = -(share * logits.T[shown].log_softmax(1)).sum(1) / share.sum(1).clamp(min=1e-3)
    return by_picture + 0.5 * by_text.mean()


def captions_loss(
    encoder: SpritesEncoder, captions: Captions, batch: Batch, frames: Tensor, clips: Tensor, generator: torch.Generator
) -> Tensor:
    """Contrastive loss of frames against colour and shape, of clips against all captions of TRAIN."""
    repeats = batch.clips.shape[1]
    full = encoder.encode_texts(_blank(captions.full, generator))
    which = torch.tensor([captions.index[s] for s in batch.scenes])
    loss = _choice(clips, full, which, batch.trust)
    still = encoder.encode_texts(_blank(captions.stills(generator), generator))
    pair = torch.tensor([captions.pairs.index((s.colour, s.shape)) for s in batch.scenes])
    frame = torch.randint(repeats, (len(clips),), generator=generator)
    one = frames.unflatten(0, (-1, repeats))[torch.arange(len(clips)), frame]
    return loss + _choice(one, still, pair, batch.trust) + _choice(clips, still, pair, batch.trust)


@dataclass(slots=True)
class Run:
    """Everything the training carries along."""

    options: TrainOptions
    encoder: SpritesEncoder
    heads: Heads
    ema: EMA
    optimisers: Optimisers
    captions: Captions
    generator: torch.Generator
    record: JsonLog
    clock: Clock
    steps: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)


def _start(options: TrainOptions) -> Run:
    encoder = build_encoder(options.seed)
    heads = Heads(encoder.config)
    ema = EMA(encoder, heads, decay=0.997)
    optimisers = Optimisers([encoder, heads], muon=0.02, adam=2e-3, edges=EDGES)
    saved = load_checkpoint(options.work / "encoder.pt") if options.resume else None
    if saved:
        encoder.load_state_dict(saved["encoder"])
        heads.load_state_dict(saved["heads"])
        ema.load_state_dict(saved["ema"])
        optimisers.load_state_dict(saved["optimisers"])
    steps, elapsed = (saved["steps"], saved["elapsed"]) if saved else (0, 0.0)
    return Run(
        options=options,
        encoder=encoder,
        heads=heads,
        ema=ema,
        optimisers=optimisers,
        captions=Captions(encoder.config.words),
        generator=torch.Generator().manual_seed(options.seed + 1 + steps),
        record=JsonLog(options.work / "train.log", fresh=saved is None),
        clock=Clock(options.minutes, elapsed),
        steps=steps,
    )


def _train_step(run: Run) -> None:
    batch = draw_batch(run.generator)
    frames, clips = run.encoder.encode_both(batch.clips)
    told = features_loss(run.heads, batch, frames[0], clips[0])
    matched = captions_loss(run.encoder, run.captions, batch, frames[1], clips[1], run.generator)
    (told + matched).backward()
    run.optimisers.step(cosine(run.clock.fraction, warmup=0.02, floor=0.01))
    run.ema.update()
    run.steps += 1
    run.history.append((told.item(), matched.item()))


def _checkpoint(run: Run) -> None:
    state = {
        "encoder": run.encoder.state_dict(),
        "heads": run.heads.state_dict(),
        "ema": run.ema.state_dict(),
        "optimisers": run.optimisers.state_dict(),
        "steps": run.steps,
        "elapsed": run.clock.elapsed,
    }
    save_checkpoint(run.options.work / "encoder.pt", state)


@torch.no_grad()
def validate(run: Run) -> dict[str, Any]:
    """On clips of captions never trained on: how far the linear readings of all clips are off, and, by attribute, how
    often the right caption of a clean clip beats those with one word wrong."""
    batch = draw_batch(torch.Generator().manual_seed(99), HELD_OUT, groups=_TEST_GROUPS)
    with run.ema.applied():
        clips = run.encoder.encode_both(batch.clips)[1]
        errors = (run.heads.clip_spoilt(clips[0]) - batch.spoilt).square().mean(0).sqrt().tolist()
        clean = slice(_TEST_GROUPS * GROUP, None)
        right = read_words(run.encoder, batch.scenes[clean], clips[1][clean]).float().mean(1).tolist()
        place = (run.heads.clip_truth(clips[0]) - batch.clip_truth)[clean].square().mean().sqrt()
    spoilt = dict(zip(KINDS, errors, strict=True))
    return {"spoilt_rms": spoilt, "truth_rms": float(place), **dict(zip(ATTRIBUTES, right, strict=True))}


def _report(run: Run) -> None:
    recent = torch.tensor(run.history[-200:]).mean(0).tolist()
    run.record.write(minute=run.clock.elapsed, step=run.steps, features=recent[0], captions=recent[1], **validate(run))


def fit(options: TrainOptions) -> Run:
    """Train for `options.minutes`; the averaged weights are in the returned run's modules."""
    run = _start(options)
    reported = run.clock.elapsed
    with progress_bar("encoder", run.clock) as tick:
        while not run.clock.done:
            _train_step(run)
            tick(f"step {run.steps} features {run.history[-1][0]:.3f} captions {run.history[-1][1]:.3f}")
            if run.clock.elapsed - reported > max(0.5, options.minutes / 12):
                reported = run.clock.elapsed
                _report(run)
                _checkpoint(run)
    _report(run)
    _checkpoint(run)
    run.ema.copy_to()
    return run


def train(options: TrainOptions) -> None:
    """Train, make the features well conditioned, and write the folder with its card."""
    run = fit(options)
    minutes = run.clock.elapsed
    generator = torch.Generator().manual_seed(options.seed + 12345)
    whiten(run.encoder, [draw_batch(generator) for _ in range(60)])
    export(run.encoder, options, run.steps, minutes)


@torch.no_grad()
def whiten(encoder: SpritesEncoder, batches: Sequence[Batch], floor: float = 0.02) -> None:
    """Turn and rescale both features, inside their last layers, to about unit covariance over clean and spoilt clips.

    Directions with less than `floor` of the mean variance are not blown up to full size.
    """
    both = [encoder.encode_both(batch.clips) for batch in batches]
    for layer, rows in (
        (encoder.frame_features, torch.cat([frames[0] for frames, _ in both])),
        (encoder.clip_features, torch.cat([clips[0] for _, clips in both])),
    ):
        values, vectors = torch.linalg.eigh(torch.cov(rows.double().T))
        gain = (values.clamp(min=0) + floor * values.mean()).rsqrt()
        turn = vectors @ torch.diag(gain) @ vectors.T
        layer.weight.copy_(turn @ layer.weight.double())
        layer.bias.copy_(turn @ (layer.bias.double() - rows.double().mean(0)))
