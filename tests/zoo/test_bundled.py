"""The bundled pipelines load offline, stay small, carry a card, and follow their prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffeff.errors import UnknownName
from diffeff.zoo import bundled
from diffeff.zoo.score import score_clips
from diffeff.zoo.world import HELD_OUT

MEGABYTE = 1_000_000
SCENES = list(HELD_OUT[:6])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other made these small models 15 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _quiet(name: str, **kwargs: Any) -> Any:
    pipeline = bundled.load(name, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _call(name: str, pipeline: Any, *first: Any, **changes: Any) -> Any:
    options = bundled.recommended(name).call_options() | changes
    with torch.no_grad():
        return pipeline(*first, **options, generator=torch.Generator().manual_seed(7), output_type="pt")


@pytest.mark.parametrize("name", bundled.NAMES)
def test_has_a_card_with_scores_and_settings(name: str) -> None:
    facts = bundled.card(name)
    assert facts["name"] == name
    assert facts["scores"]
    assert bundled.recommended(name).steps >= 4
    assert (bundled.path(name) / "README.md").stat().st_size > 200


@pytest.mark.parametrize("name", bundled.NAMES)
def test_names_no_machine(name: str) -> None:
    for file in bundled.path(name).rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "/home/" not in text
        assert "_name_or_path" not in json.loads(text)


def test_all_together_are_small() -> None:
    files = [file for name in bundled.NAMES for file in bundled.path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40 * MEGABYTE


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownName, match="sprites-sd"):
        bundled.load("sprites-sdx")


@pytest.mark.parametrize("name", ["digits-dit", "sprites-sd", "sprites-motion"])
def test_loads_in_one_precision(name: str) -> None:
    pipeline = _quiet(name)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


def test_digits_are_read_as_what_was_asked_for() -> None:
    digits = pytest.importorskip("diffeff.zoo.train.digits", reason="scikit-learn judges the digits")
    labels = torch.arange(10).repeat(2)
    images = _call("digits-dit", _quiet("digits-dit"), labels.tolist()).images
    assert digits.score_digits(images * 2 - 1, labels).right >= 18


def test_images_follow_their_captions() -> None:
    pipeline = _quiet("sprites-sd")
    images = _call("sprites-sd", pipeline, [scene.caption for scene in SCENES]).images
    scores = score_clips(SCENES, list(images))
    assert scores.attributes["colour"].right == len(SCENES)
    assert scores.attributes["shape"].right >= len(SCENES) - 1


def test_clips_follow_their_captions() -> None:
    pipeline = _quiet("sprites-motion")
    scenes = SCENES[:4]
    clips = _call("sprites-motion", pipeline, [scene.caption for scene in scenes]).frames
    scores = score_clips(scenes, list(clips))
    assert scores.attributes["colour"].right == len(scenes)
    assert all(scores.attributes[name].right >= len(scenes) - 1 for name in ("shape", "motion"))


def test_motion_uses_the_weights_of_the_image_model() -> None:
    image, video = _quiet("sprites-sd"), _quiet("sprites-motion")
    mine = dict(video.unet.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in image.unet.named_parameters())
    assert not list(bundled.path("sprites-motion").glob("unet*"))
