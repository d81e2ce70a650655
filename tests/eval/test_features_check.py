"""The check of the sprites features reports what it sees: rows, verdicts, a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffeff.errors import ConfigError
from diffeff.eval import features_check as check
from diffeff.eval.features.sprites import SpritesFeatures
from diffeff.eval.features_figure import draw
from diffeff.zoo import bundled
from diffeff.zoo.train.wan_model import Joint
from diffeff.zoo.world import HELD_OUT


@pytest.fixture(scope="module")
def source() -> SpritesFeatures:
    return SpritesFeatures()


@pytest.fixture(scope="module")
def reference(source: SpritesFeatures) -> check.Reference:
    return check.Reference(source, check.held_out(16, 1))


def test_rises_is_strict() -> None:
    assert check.rises([1, 2, 3])
    assert not check.rises([1, 1, 2])
    assert not check.rises([2, 1])


def test_every_kind_has_levels_that_begin_clean() -> None:
    clips = check.held_out(2, 0)
    for kind, level in check.LEVELS.items():
        assert check.rises(level.amounts)
        assert check.spoil(clips, kind, level.amounts[0], 0) is clips
        assert not torch.equal(check.spoil(clips, kind, level.amounts[-1], 0), clips)


def test_a_row_of_each_check(source: SpritesFeatures, reference: check.Reference, tmp_path: Path) -> None:
    clips = check.held_out(16, 2)
    noise = check.check_degradation(reference, clips, "noise")
    assert noise["rises"]["clips"]["frechet"] is True
    assert noise["clips"]["kernel"][-1] > noise["clips"]["kernel"][0]
    assert set(check.check_degradation(reference, clips, "repeat")["rises"]) == {"clips"}
    words = check.check_captions(source, clips, HELD_OUT[:16], "motion")
    assert words["falls"] is True
    assert words["separated"] > 0.9
    out = tmp_path / "rows" / "features.jsonl"
    for row in (noise, words):
        check._append(out, source, 0, row)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["check"] for row in rows] == ["degradation", "captions"]
    assert all(row["benchmark"] == "features" and row["features"]["label"] == "sprites" for row in rows)
    assert "noise" in check.summary(rows[0])
    assert "motion" in check.summary(rows[1])


def test_snapshots_are_ranked(reference: check.Reference, tmp_path: Path) -> None:
    pipe: Any = bundled.load("sprites-wan")
    trained = Joint(pipe.text_encoder, pipe.transformer).state_dict()
    spoilt = {name: torch.zeros_like(t) if "proj_out" in name else t for name, t in trained.items()}
    torch.save(spoilt, tmp_path / "step-000010.pt")
    with pytest.raises(ConfigError, match="two or more"):
        check.check_checkpoints(reference, tmp_path)
    torch.save(trained, tmp_path / "step-000020.pt")
    row = check.check_checkpoints(reference, tmp_path, count=4, steps=3)
    assert row["steps"] == [10, 20]
    assert row["in_order"]["clips"]["frechet"] is True
    assert row["in_order"]["score"] is True
    assert row["adherence"]["colour"][1] == 1.0


def rows() -> list[dict[str, Any]]:
    curve = {"frechet": [0.5, 1.0, 4.0], "kernel": [-0.01, 0.2, 3.0]}
    both = {"frames": curve, "clips": curve}
    degradation = {"check": "degradation", "kind": "noise", "unit": "sigma", "amounts": [0, 1, 2], **both}
    captions = {"check": "captions", "attribute": "shape", "shares": [0, 0.5, 1], "score": [80.0, 70.0, 60.0]}
    return [degradation, captions, {"check": "checkpoints", "steps": [10, 20, 40], **both}]


@pytest.mark.parametrize("count", [0, 2, 3])
def test_the_figure_takes_what_there_is(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    path = draw(rows()[:count], tmp_path / "images" / "check.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_training_snapshots_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--train-checkpoints", "5"])
    assert "needs --checkpoints" in capsys.readouterr().err
