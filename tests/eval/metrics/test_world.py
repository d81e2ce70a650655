"""Adherence of rendered clips to their captions, and to captions that are wrong in one word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.result import Result
from diffeff.eval.metrics.world import ALL, adherence, adherence_results, shown
from diffeff.zoo.score import wilson
from diffeff.zoo.world import HELD_OUT, Scene, render

SCENES = HELD_OUT[:6]


@pytest.fixture(scope="module")
def clips() -> NDArray[np.float32]:
    frames = render(SCENES, generator=torch.Generator().manual_seed(0))
    return frames.permute(0, 1, 3, 4, 2).numpy()


def by_attribute(results: list[Result]) -> dict[str, Result]:
    return {result.details["attribute"]: result for result in results}


def test_clips_of_the_world_show_their_captions(clips: NDArray[np.float32]) -> None:
    results = by_attribute(adherence(SCENES, clips))
    assert list(results) == ["colour", "shape", "motion", "camera", ALL]
    assert all(result.value == 1 for result in results.values())
    assert results["colour"].label == "adherence: colour"
    assert results["colour"].interval is not None
    assert results["colour"].interval.low == pytest.approx(wilson(6, 6)[0])


def test_one_wrong_word_is_one_wrong_attribute(clips: NDArray[np.float32]) -> None:
    wrong = replace(SCENES[0], colour="red" if SCENES[0].colour != "red" else "blue")
    results = by_attribute(adherence([wrong, *SCENES[1:]], clips))
    assert results["colour"].value == results[ALL].value == pytest.approx(5 / 6)
    assert results["shape"].value == 1
    assert results["colour"].details["right"] == 5


def test_bytes_will_do_and_clips_may_come_one_by_one(clips: NDArray[np.float32]) -> None:
    def stream() -> Iterator[NDArray[Any]]:
        for clip in clips:
            yield (clip * 255).round().astype(np.uint8)

    assert [r.value for r in adherence(SCENES, stream())] == [1] * 5


def test_a_still_shows_colour_and_shape_only(clips: NDArray[np.float32]) -> None:
    assert shown(SCENES[0], clips[0][4:5]) == {"colour": True, "shape": True}


def test_an_empty_picture_is_wrong_not_an_error() -> None:
    assert not any(shown(Scene("red", "circle", "moving left", "pans left"), np.zeros((9, 64, 64, 3))).values())
    assert not any(shown(Scene("red", "circle"), np.full((1, 64, 64, 3), np.nan)).values())


def test_records_of_stills_and_clips_together() -> None:
    records = [{"colour": True, "shape": False}, {"colour": True, "shape": True, "motion": False, "camera": True}]
    results = by_attribute(adherence_results(records))
    assert (results["colour"].value, results["shape"].value, results["motion"].value) == (1, 0.5, 0)
    assert (results["colour"].n, results["motion"].n, results[ALL].n) == (2, 1, 2)
    assert results[ALL].value == 0


@pytest.mark.parametrize(("scenes", "more"), [(SCENES[:5], "more"), ((*SCENES, SCENES[0]), "fewer")])
def test_one_clip_for_each_scene(clips: NDArray[np.float32], scenes: tuple[Scene, ...], more: str) -> None:
    with pytest.raises(ConfigError, match=f"{more} clips than the {len(scenes)} scenes"):
        adherence(scenes, clips)


def test_nothing_to_look_at() -> None:
    with pytest.raises(ConfigError, match="no clips"):
        adherence([], [])
