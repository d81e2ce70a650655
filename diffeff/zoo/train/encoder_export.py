"""`sprites-encoder` as a folder: weights in fp16, a card with what the saved files score, and a README."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.zoo.encoder import SpritesEncoder, load_encoder, word_ids
from diffeff.zoo.score import Accuracy, Scores, score_table, write_card
from diffeff.zoo.train.harness import TrainOptions, publish
from diffeff.zoo.world import ATTRIBUTES, HELD_OUT, Scene, render


def labels(scenes: Sequence[Scene]) -> Tensor:
    """Which word of each attribute, [4, B]."""
    return torch.tensor([[words.index(getattr(s, name)) for s in scenes] for name, words in ATTRIBUTES.items()])


@torch.no_grad()
def read_words(encoder: SpritesEncoder, scenes: Sequence[Scene], embeds: Tensor) -> Tensor:
    """Per attribute, whether a clip's own caption is nearer to it than all those with another word there: [4, B]."""
    right = []
    for wanted, (name, words) in zip(labels(scenes), ATTRIBUTES.items(), strict=True):
        captions = [replace(scene, **{name: word}).caption for scene in scenes for word in words]
        texts = encoder.encode_texts(word_ids(captions, encoder.config.words)[0]).view(len(scenes), len(words), -1)
        right.append(F.cosine_similarity(embeds.unsqueeze(1), texts, dim=2).argmax(1) == wanted)
    return torch.stack(right)


@torch.no_grad()
def score_encoder(encoder: SpritesEncoder, seed: int = 4321) -> Scores:
    """How often captions that were never trained on find their clip, by attribute; one fresh clip of each."""
    right = []
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, len(HELD_OUT), 50):
        scenes = HELD_OUT[begin : begin + 50]
        clips = (render(scenes, generator=generator) * 255).round() / 255
        right.append(read_words(encoder, scenes, encoder.encode_clips(clips)[1]))
    found, trials = torch.cat(right, 1), len(HELD_OUT)
    attributes = {name: Accuracy(int(row.sum()), trials) for name, row in zip(ATTRIBUTES, found, strict=True)}
    return Scores(attributes, Accuracy(int(found.all(0).sum()), trials), {})


def export(encoder: SpritesEncoder, options: TrainOptions, steps: int, minutes: float) -> Scores:
    """Write the folder in one rename; the scores are those of the written files."""
    from safetensors.torch import save_file

    built = options.work / "export"
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    weights = {name: value.detach().half().contiguous() for name, value in encoder.state_dict().items()}
    save_file(weights, built / "model.safetensors", metadata={"format": "pt"})
    (built / "model.safetensors").chmod(0o644)
    shutil.copyfile(options.work / "train.log", built / "train.log")
    card: dict[str, Any] = {"name": "sprites-encoder", "network": encoder.config.to_dict()}
    write_card(built, card, "")
    scores = score_encoder(load_encoder(built))
    last = json.loads((built / "train.log").read_text("utf-8").splitlines()[-1])
    card |= {
        "pipeline": None,
        "task": "features of frames and clips of the bundled world, and a text-image score",
        "captions": f"trained on TRAIN; scored on {len(HELD_OUT)} captions never trained on, one clip each",
        "scores": scores.to_json(),
        "spoilt_rms": last["spoilt_rms"],
        "training": {"device": str(options.device), "minutes": round(minutes, 1), "steps": steps, "seed": options.seed},
        "weights_bytes": (built / "model.safetensors").stat().st_size,
    }
    write_card(built, card, _readme(card, scores))
    publish(built, options.out)
    return scores


def _readme(card: dict[str, Any], scores: Scores) -> str:
    network, training = card["network"], card["training"]
    rows = "\n".join(f"| {kind} | {error:.3f} |" for kind, error in card["spoilt_rms"].items())
    return README.format(
        megabytes=card["weights_bytes"] / 1e6, table=score_table(scores), spoilt=rows, **network, **training
    )


README = """\
# sprites-encoder

The encoder behind the `sprites` features of `diffeff eval`: {megabytes:.1f} MB that turn frames of the bundled world
(`diffeff.zoo.world`) into {frame_dim} numbers, clips into {clip_dim}, and frames, clips and captions into one space of
{embed_dim}. It is no pipeline, and it knows no other pictures: numbers made with it are labelled `sprites` and compare
with each other only, never with FID over Inception or a CLIP score.

```python
from diffeff.eval.features.sprites import SpritesFeatures

features = SpritesFeatures()
features.clips(clips)  # uint8 [N, F, 3, 64, 64] to float32 [N, {clip_dim}]
```

## Measured

On captions never trained on, one fresh clip each: how often the right caption is nearer to its clip than all captions
with another word in that place.

{table}

How far its linear readings were off, root mean square over clean and spoilt clips of held-out captions, in training
(0 is unspoilt, 1 the most; the square root of the strength):

| spoilt by | error |
|---|---|
{spoilt}

`python -m diffeff.eval.features_check` measures what the features are for: distances to real clips that rise with
noise, blur and dropped frames, text scores that fall with wrong words, snapshots of a training run in order.

## How it was trained

`python -m diffeff.zoo.train sprites-encoder` on `{device}`, {minutes:.0f} minutes on a busy machine, {steps} steps of
54 freshly rendered clips, two thirds of them spoilt: contrastive against captions, and linear readings of words,
positions, camera and the strength of twelve degradations (`diffeff.zoo.degrade`), all from the features; these are then
turned to about unit covariance. `train.log` has the curve, `card.json` these numbers.
"""
