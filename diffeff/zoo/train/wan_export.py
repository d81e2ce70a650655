"""`sprites-wan` as a plain diffusers pipeline: build it, sample it, save it, score it, write its card."""

from __future__ import annotations

import copy
import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from torch import Tensor

from diffeff.zoo.score import Scores, score_clips, score_table, write_card
from diffeff.zoo.train.harness import TrainOptions, publish
from diffeff.zoo.train.wan_codec import FRAMES, SIZE, Vae
from diffeff.zoo.train.wan_model import Joint, WordTokenizer
from diffeff.zoo.world import HELD_OUT, Scene

Pipeline: TypeAlias = Any  # diffusers.WanPipeline
_diffusers: Any = diffusers  # a lazy module, opaque to type checkers

STEPS, GUIDANCE, FLOW_SHIFT = 30, 2.0, 3.0


def build_pipeline(tokenizer: WordTokenizer, joint: Joint, vae: Vae) -> Pipeline:
    """The modules as a plain diffusers WanPipeline."""
    scheduler = _diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    pipe = _diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=joint.text_encoder,
        transformer=joint.transformer,
        vae=vae,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: Pipeline,
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


def export(pipe: Pipeline, options: TrainOptions) -> None:
    """Write the pipeline in fp16 to `options.out`, in one rename."""
    built = options.work / "export"
    shutil.rmtree(built, ignore_errors=True)
    pipe.save_pretrained(built, safe_serialization=True)
    # fp16 halves the download; the text encoder is tiny, and transformers would load it in the saved type.
    for name, module in (("transformer", pipe.transformer), ("vae", pipe.vae)):
        copy.deepcopy(module).half().save_pretrained(built / name, safe_serialization=True)
    _name_tokenizer_portably(built)
    publish(built, options.out)


def _name_tokenizer_portably(folder: Path) -> None:
    """transformers 5 records a class name that transformers 4 lacks; this one exists in both."""
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")


def score_export(options: TrainOptions, *, steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 1000) -> Scores:
    """Load the exported folder like any user would, sample all held-out captions, write the model card."""
    pipe = _diffusers.WanPipeline.from_pretrained(options.out, local_files_only=True).to(options.device)
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

pipe = _diffusers.WanPipeline.from_pretrained("path/to/sprites-wan")
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

- `python -m diffeff.zoo.train sprites-wan` on `{device}`.
- Autoencoder, {vae_minutes:.0f} minutes, {vae_steps} steps: squared and absolute error, outline of the object weighted
  up, Muon + AdamW; {psnr:.1f} dB on clips it has not seen.
- UMT5 text encoder and Wan transformer together, {joint_minutes:.0f} minutes, {joint_steps} steps of 40 clips: flow
  matching with most noise levels high, freshly rendered clips throughout, 10 % empty captions, Muon + AdamW with
  a cosine schedule over the clock, averaged weights.
- `train.log` has the curve, `card.json` these numbers.

## Limits

It knows 23 words and nothing else; other words are read as unknown. Sizes, lengths and aspect ratios other than
9 frames of 64x64 were not trained. Outlines wobble a little from frame to frame and the floor is soft. The scores
are near their ceiling, so they notice breakage and not small losses: compare pixels with the unmodified run for
those.
"""
