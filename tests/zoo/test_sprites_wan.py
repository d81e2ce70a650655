"""The bundled text-to-video model: plain diffusers loads it, its card tells the truth, it follows its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffeff.zoo import bundled
from diffeff.zoo.score import score_clips, wilson
from diffeff.zoo.train.wan_export import sample
from diffeff.zoo.train.wan_model import Joint, tokenise
from diffeff.zoo.world import HELD_OUT, Scene

PROMPTS = (
    Scene("red", "circle", "moving left", "pans right"),
    Scene("cyan", "cross", "standing still", "static"),
    Scene("blue", "triangle", "moving up", "zooms in"),
    Scene("yellow", "circle", "moving down", "pans left"),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return bundled.path("sprites-wan")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipeline = diffusers.WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_a_plain_diffusers_folder(pipe: Any) -> None:
    assert isinstance(pipe.transformer, diffusers.WanTransformer3DModel)
    assert isinstance(pipe.vae, diffusers.AutoencoderKLWan)
    assert len(pipe.transformer.blocks) == 8
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 2)
    assert len(pipe.vae.config.latents_mean) == len(pipe.vae.config.latents_std) == 16


def test_weights_are_half_precision_and_small(folder: Path) -> None:
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) < 15_000_000
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    assert transformer.proj_out.weight.dtype == torch.float16


def test_the_card_agrees_with_itself(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    readme = (folder / "README.md").read_text()
    accuracy = card["scores"]["accuracy"]
    assert set(accuracy) == {"colour", "shape", "motion", "camera", "all"}
    for entry in accuracy.values():
        assert entry["trials"] == len(HELD_OUT) == card["scored"]["captions"]
        assert entry["interval95"] == pytest.approx(wilson(entry["right"], entry["trials"]), abs=1e-3)
        assert f"{entry['right']} / {entry['trials']}" in readme


def test_every_word_is_one_token(pipe: Any) -> None:
    ids = tokenise(pipe.tokenizer, [s.caption for s in PROMPTS], torch.device("cpu"))
    assert ids.shape == (4, 10)
    assert not (ids == pipe.tokenizer.unk_token_id).any()
    assert pipe.tokenizer.decode(ids[0], skip_special_tokens=True) == PROMPTS[0].caption.replace(",", " ,")


def test_the_training_forward_is_the_pipelines_forward(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 16, 5, 8, 8, generator=generator)
    sigma = torch.tensor([0.9, 0.4])
    tokens = tokenise(pipe.tokenizer, [s.caption for s in PROMPTS[:2]], torch.device("cpu"))
    length = 40
    padding = length - (tokens != 0).sum(1)
    text, _ = pipe.encode_prompt([s.caption for s in PROMPTS[:2]], None, False, max_sequence_length=length)
    with torch.no_grad():
        ours = Joint(pipe.text_encoder, pipe.transformer)(noisy, sigma, tokens, padding.float())
        theirs = pipe.transformer(noisy, 1000 * sigma, text, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_it_follows_its_prompts(pipe: Any) -> None:
    clips = sample(pipe, PROMPTS, steps=bundled.recommended("sprites-wan").steps, seed=5)
    scores = score_clips(PROMPTS, clips)
    # Colour is never missed on 200 captions; of the other words one miss in four leaves room for other hardware.
    assert scores.attributes["colour"].right == 4, scores.confusions
    assert min(a.right for a in scores.attributes.values()) >= 3, scores.confusions
