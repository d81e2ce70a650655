"""Training that is interrupted and resumed, and what the trainers share around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffeff.zoo.train.harness import JsonLog, TrainOptions
from diffeff.zoo.train.latents import describe, keep_autoencoder, kept_autoencoder, sample_captions
from diffeff.zoo.train.resumable import Resumable


def start(path: Path, resume: bool) -> Resumable:
    torch.manual_seed(0)
    networks = {"first": nn.Linear(16, 32), "second": nn.Linear(32, 4)}
    return Resumable(path, networks, muon=0.02, adam=1e-2, edges=("second",), decay=0.9, resume=resume)


def train(run: Resumable, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        run.step(run.networks["second"](run.networks["first"](x).relu()).square().mean(), 1.0)


def weights(run: Resumable) -> list[Tensor]:
    return [p for network in run.networks.values() for p in network.parameters()] + run.ema.shadow


def test_an_interrupted_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole.pt", resume=False)
    train(whole, range(6))
    begun = start(tmp_path / "part.pt", resume=False)
    train(begun, range(3))
    begun.save(elapsed=1.5)
    resumed = start(tmp_path / "part.pt", resume=True)
    assert resumed.elapsed == 1.5
    train(resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert len(resumed.optimisers.all) == 2  # Muon for the hidden matrix, AdamW for the edge and the biases
    fresh = start(tmp_path / "part.pt", resume=False)
    assert fresh.elapsed == 0.0
    assert not torch.equal(weights(fresh)[0], weights(resumed)[0])


def options(work: Path, resume: bool) -> TrainOptions:
    return TrainOptions(name="x", out=work, work=work, minutes=1.0, device=torch.device("cpu"), resume=resume)


class Codec(nn.Linear):
    """As much of an autoencoder as is kept."""

    def register_to_config(self, **facts: float) -> None:
        self.facts = facts


def test_a_kept_autoencoder_comes_back(tmp_path: Path) -> None:
    trained, other = Codec(4, 4), Codec(4, 4)
    assert not kept_autoencoder(other, options(tmp_path, resume=True))
    keep_autoencoder(trained, options(tmp_path, resume=True))
    assert not kept_autoencoder(other, options(tmp_path, resume=False))
    assert not torch.equal(trained.weight, other.weight)
    assert kept_autoencoder(other, options(tmp_path, resume=True))
    assert torch.equal(trained.weight, other.weight)
    assert other.facts == {"scaling_factor": 1.0}


@pytest.mark.parametrize("count", [1, 4, 5])
def test_captions_are_sampled_in_batches_with_a_seed_each(count: int) -> None:
    calls: list[dict[str, Any]] = []

    class Pipe:
        def set_progress_bar_config(self, **_: Any) -> None: ...

        def __call__(self, captions: list[str], **rest: Any) -> tuple[Tensor, None]:
            calls.append({"captions": captions, "seed": rest["generator"].initial_seed(), "height": rest["height"]})
            return torch.full((len(captions), 3, 2, 2), float(len(calls)), dtype=torch.float16), None

    captions = [f"caption {i}" for i in range(count)]
    made = sample_captions(Pipe(), captions, batch=2, steps=3, guidance=1.0, seed=10, height=2)
    assert made.shape == (count, 3, 2, 2)
    assert made.dtype == torch.float32
    assert [caption for call in calls for caption in call["captions"]] == captions
    assert [call["seed"] for call in calls] == list(range(10, 10 + count, 2))
    assert {call["height"] for call in calls} == {2}


def test_a_card_and_the_curve_stand_beside_the_weights(tmp_path: Path) -> None:
    log = JsonLog(tmp_path / "work" / "train.log")
    log.write(stage="vae", loss=0.5)
    describe(tmp_path, {"name": "x"}, "# x", log)
    assert json.loads((tmp_path / "card.json").read_text())["name"] == "x"
    assert (tmp_path / "README.md").read_text().startswith("# x")
    assert json.loads((tmp_path / "train.log").read_text())["loss"] == 0.5
