"""The world says what it draws, the judge reads it back, and the split never moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.zoo import score
from diffeff.zoo.measure import adherence, measure, object_mask
from diffeff.zoo.world import (
    ATTRIBUTES,
    DISPLACEMENT,
    HELD_OUT,
    PAN,
    SCENES,
    TRAIN,
    ZOOM,
    Scene,
    render,
    sample_scenes,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blurred(clips: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = F.pad(clips.flatten(0, 2).unsqueeze(1), (6, 6, 6, 6), mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(clips)


# ------------------------------------------------------------------ captions and split


def test_every_caption_round_trips() -> None:
    assert [Scene.parse(s.caption) for s in SCENES] == list(SCENES)
    assert Scene.parse("A red  circle moving left, camera pans right").caption == (
        "a red circle moving left, camera pans right"
    )
    assert Scene.parse("a blue cross") == Scene("blue", "cross", "standing still", "static")


@pytest.mark.parametrize("text", ["", "a dog", "a red circle moving left", "a red circle flying, camera static"])
def test_foreign_captions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        Scene.parse(text)


def test_a_wrong_word_is_named() -> None:
    with pytest.raises(ValueError, match=r"Scene\.shape='square'"):
        Scene("red", "square")


def test_split_is_disjoint_complete_and_fixed() -> None:
    assert (len(TRAIN), len(HELD_OUT), len(set(SCENES))) == (250, 200, 450)
    assert not set(TRAIN) & set(HELD_OUT)
    assert TRAIN[0].caption == "a magenta circle moving left, camera static"
    assert HELD_OUT[-1].caption == "a red triangle moving left, camera static"


@pytest.mark.parametrize("attribute", sorted(ATTRIBUTES))
def test_every_word_is_well_represented_in_training(attribute: str) -> None:
    words = [getattr(s, attribute) for s in TRAIN]
    fair = len(TRAIN) / len(ATTRIBUTES[attribute])
    assert all(words.count(w) > 0.8 * fair for w in ATTRIBUTES[attribute])


# ------------------------------------------------------------------ rendering


def test_render_is_deterministic_per_seed() -> None:
    first, again, other = (render(TRAIN[:3], generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 9, 3, 64, 64)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize(("frames", "size"), [(1, 64), (5, 32), (17, 96)])
def test_render_other_lengths_and_sizes(frames: int, size: int) -> None:
    scene = Scene("green", "triangle", "moving right", "zooms out")
    clip = render([scene], frames=frames, size=size, generator=seeded())
    assert clip.shape == (1, frames, 3, size, size)
    assert all(adherence(scene, measure(clip[0])).values())


def test_render_refuses_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="render needs scenes"):
        render([])


def test_truth_is_what_was_drawn() -> None:
    scenes = [Scene("red", "circle", "moving up", "pans left"), Scene("blue", "cross", "moving left", "zooms in")]
    clip, truth = render(scenes, generator=seeded(), return_truth=True)
    path = truth.centre[:, -1] - truth.centre[:, 0]
    torch.testing.assert_close(path, torch.tensor([[0.0, -DISPLACEMENT], [-DISPLACEMENT, 0.0]]))
    assert float(truth.pan[0, -1] - truth.pan[0, 0]) == pytest.approx(-PAN)
    assert float(truth.zoom[1, -1] / truth.zoom[1, 0]) == pytest.approx(ZOOM)
    drawn = truth.mask[0] > 0.5
    overlap = (object_mask(clip[0]) & drawn).sum() / drawn.sum()
    assert overlap > 0.97


def test_object_stays_inside_the_frame() -> None:
    scenes = [s for s in SCENES if s.colour == "red" and s.camera == "static"] * 8
    _, truth = render(scenes, generator=seeded(), return_truth=True)
    rim = torch.cat([truth.mask[..., 0, :], truth.mask[..., -1, :], truth.mask[..., 0], truth.mask[..., -1]])
    assert rim.max() < 0.5


# ------------------------------------------------------------------ measuring


@pytest.mark.parametrize("damage", ["none", "blur", "blur and noise"])
def test_measure_reads_ground_truth(damage: str) -> None:
    scenes = sample_scenes(SCENES, 200 if damage == "none" else 50, seeded(5))
    clips = render(scenes, generator=seeded(6))
    if damage != "none":
        clips = blurred(clips, 1.5)
    if damage == "blur and noise":
        clips = (clips + 0.04 * torch.randn(clips.shape, generator=seeded(7))).clamp(0, 1)
    scores = score.score_clips(scenes, clips)
    assert {name: a.accuracy >= 0.98 for name, a in scores.attributes.items()} == dict.fromkeys(ATTRIBUTES, True)


def test_measure_amplitudes() -> None:
    scene = Scene("cyan", "circle", "moving down", "pans right")
    seen = measure(render([scene], generator=seeded())[0])
    assert seen.displacement == pytest.approx((0.0, DISPLACEMENT), abs=1.0)
    assert seen.pan == pytest.approx((PAN, 0.0), abs=2.0)
    assert seen.overlap > 0.9


def test_measure_single_image_has_no_motion() -> None:
    scene = Scene("magenta", "cross")
    seen = measure(render([scene], frames=1, generator=seeded())[0, 0])
    assert (seen.colour, seen.shape, seen.motion, seen.camera) == ("magenta", "cross", None, None)
    assert adherence(scene, seen) == {"colour": True, "shape": True}


def test_measure_sees_no_object_where_there_is_none() -> None:
    seen = measure(torch.full((9, 3, 64, 64), 0.5))
    assert (seen.colour, seen.shape, seen.motion) == (None, None, None)
    assert adherence(TRAIN[0], seen)["colour"] is False


def test_measure_survives_garbage() -> None:
    measure(torch.rand(9, 3, 64, 64, generator=seeded()))
    measure(torch.full((9, 3, 64, 64), float("nan")))


@pytest.mark.parametrize("bad", [torch.zeros(9, 64, 64, 3), torch.zeros(9, 3, 64, 64, dtype=torch.uint8)])
def test_measure_refuses_other_layouts(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="measure needs float"):
        measure(bad)


# ------------------------------------------------------------------ scoring


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (190, 200, 0.9104, 0.9726)],
)
def test_wilson_known_values(right: int, trials: int, low: float, high: float) -> None:
    assert score.wilson(right, trials) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize(("right", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(right: int, trials: int) -> None:
    with pytest.raises(ValueError, match="wilson needs"):
        score.wilson(right, trials)


def test_scores_name_the_confusion() -> None:
    shown = Scene("red", "circle", "moving left", "static")
    wanted = Scene("blue", "circle", "moving left", "static")
    scores = score.score_clips([shown, wanted], render([shown, shown], generator=seeded()))
    assert (scores.attributes["colour"].right, scores.everything.right) == (1, 1)
    assert scores.confusions == {"colour": {"blue -> red": 1}}
    assert "| colour | 0.500 |" in score.score_table(scores)
