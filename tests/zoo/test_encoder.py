"""The sprites encoder: its files tell the truth about it, and its trainer makes what the card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from diffeff.errors import ModelLoadError
from diffeff.zoo.encoder import FOLDER, SpritesEncoder, load_card, load_encoder, word_ids
from diffeff.zoo.score import wilson
from diffeff.zoo.train import encoder as trainer
from diffeff.zoo.train.encoder_export import export, read_words
from diffeff.zoo.train.harness import TrainOptions
from diffeff.zoo.world import ATTRIBUTES, HELD_OUT, TRAIN, render


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def encoder() -> SpritesEncoder:
    return load_encoder()


def test_it_is_small() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size == load_card()["weights_bytes"] <= 2_000_000
    assert max(load_card()["network"][name] for name in ("frame_dim", "clip_dim", "embed_dim")) <= 64


def test_the_card_agrees_with_itself() -> None:
    card, readme = load_card(), (FOLDER / "README.md").read_text("utf-8")
    assert card["name"] == FOLDER.name == "sprites-encoder"
    accuracy = card["scores"]["accuracy"]
    assert set(accuracy) == {*ATTRIBUTES, "all"}
    for entry in accuracy.values():
        assert entry["trials"] == len(HELD_OUT)
        assert entry["interval95"] == pytest.approx(wilson(entry["right"], entry["trials"]), abs=1e-3)
        assert f"{entry['right']} / {entry['trials']}" in readme
    assert "/home/" not in json.dumps(card)


def test_it_reads_captions_it_was_not_trained_on(encoder: SpritesEncoder) -> None:
    scenes = HELD_OUT[:30]
    assert not set(scenes) & set(TRAIN)
    clips = render(scenes, generator=seeded(77))
    right = read_words(encoder, scenes, encoder.encode_clips(clips)[1]).float().mean(1)
    assert right.min() >= 0.95


def test_frames_and_clips_together_are_the_same_as_apart(encoder: SpritesEncoder) -> None:
    clips = render(HELD_OUT[:2], frames=4, generator=seeded())
    frames, whole = encoder.encode_both(clips)
    assert torch.allclose(frames[0], encoder.encode_frames(clips.flatten(0, 1))[0], atol=1e-4)
    assert torch.allclose(whole[1], encoder.encode_clips(clips)[1], atol=1e-4)


def test_words() -> None:
    ids, unknown = word_ids(["A red  circle, camera", "a dog", "", "red " * 50], ["a", ",", "camera", "red", "circle"])
    assert ids.shape == (4, 32)
    assert ids[0, :6].tolist() == [2, 5, 6, 3, 4, 0]
    assert ids[1, :3].tolist() == [2, 1, 0]
    assert unknown == [0, 1, 0, 0]
    assert (ids[:, -1] == 0).all()


def test_missing_files_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"zoo\.train sprites-encoder"):
        load_encoder(tmp_path)
    (tmp_path / "card.json").write_text((FOLDER / "card.json").read_text("utf-8"))
    with pytest.raises(ModelLoadError, match="model"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all, but longer than eight bytes"])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_text((FOLDER / "card.json").read_text("utf-8"))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match="cannot be used"):
        load_encoder(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    card = load_card()
    card["network"]["clip_dim"] += 1
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes())
    with pytest.raises(ModelLoadError, match="clip_features"):
        load_encoder(tmp_path)


# ------------------------------------------------------------------ training


def test_a_batch_is_spoilt_in_part_and_reproducible() -> None:
    batch, again = trainer.draw_batch(seeded(5)), trainer.draw_batch(seeded(5))
    assert torch.equal(batch.clips, again.clips)
    assert batch.scenes == again.scenes
    assert len(batch.clips) == len(batch.spoilt) == len(batch.trust) == 54
    clean = batch.spoilt.amax(1) == 0
    assert clean[36:].all()
    assert not clean[:36].all()
    assert (batch.trust[clean] == 1).all()
    assert (batch.clips * 255 - (batch.clips * 255).round()).abs().max() < 1e-4


def test_a_short_run_learns_and_resumes(tmp_path: Path) -> None:
    options = TrainOptions(
        name="sprites-encoder", out=tmp_path / "out", work=tmp_path, minutes=0.05, device=torch.device("cpu")
    )
    run = trainer.fit(options)
    assert run.steps >= 1
    assert all(torch.isfinite(p).all() for p in run.encoder.parameters())
    resumed = trainer._start(options)
    assert resumed.steps == run.steps
    assert resumed.clock.done


def test_whitened_features_have_about_unit_covariance() -> None:
    untrained = trainer.build_encoder()
    nn.init.normal_(untrained.clip_features.weight, std=3.0)
    batches = [trainer.draw_batch(seeded(i)) for i in range(3)]
    trainer.whiten(untrained, batches, floor=1e-6)
    with torch.no_grad():
        rows = torch.cat([untrained.encode_clips(batch.clips)[0] for batch in batches])
    assert rows.mean(0).abs().max() < 1e-2
    assert torch.allclose(torch.cov(rows.T), torch.eye(rows.shape[1]), atol=0.1)


def test_what_is_exported_loads_again(tmp_path: Path) -> None:
    untrained = trainer.build_encoder()
    options = TrainOptions(
        name="sprites-encoder", out=tmp_path / "out", work=tmp_path / "work", minutes=1, device=torch.device("cpu")
    )
    options.work.mkdir()
    (options.work / "train.log").write_text(json.dumps({"spoilt_rms": {"noise": 0.1}}) + "\n")
    export(untrained, options, steps=0, minutes=0.0)
    again = load_encoder(options.out)
    for name, value in untrained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())
    assert load_card(options.out)["training"]["steps"] == 0
    assert (options.out / "README.md").stat().st_size > 500
