"""The sprites features: they are what the protocols ask for, every row stands alone, and they notice quality."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffeff.errors import ConfigError, ModelLoadError
from diffeff.eval.features.source import ClipSource, FeatureSource, TextImageSource
from diffeff.eval.features.sprites import SpritesFeatures
from diffeff.eval.metrics.frechet import Moments, frechet_distance
from diffeff.files import sha256
from diffeff.zoo.degrade import degrade
from diffeff.zoo.encoder import FOLDER
from diffeff.zoo.world import ATTRIBUTES, HELD_OUT, render

SCENES = HELD_OUT[:24]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(seed: int, frames: int = 9, size: int = 64) -> Tensor:
    clips = render(SCENES, frames=frames, size=size, generator=torch.Generator().manual_seed(seed))
    return (clips * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def source() -> SpritesFeatures:
    return SpritesFeatures()


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return drawn(5)


def test_it_is_a_source_of_every_kind(source: SpritesFeatures) -> None:
    assert isinstance(source, FeatureSource)
    assert isinstance(source, ClipSource)
    assert isinstance(source, TextImageSource)
    assert source.sha256 == sha256(FOLDER / "model.safetensors")


def test_it_says_what_it_is(source: SpritesFeatures) -> None:
    facts = json.loads(json.dumps(source.describe()))
    assert (facts["spec"], facts["label"], facts["size"], facts["dim"]) == ("sprites", "sprites", 64, source.dim)
    assert "inception" not in facts["label"].lower()
    assert "not comparable" in facts["trained_on"]


def test_shapes_and_types(source: SpritesFeatures, clips: Tensor) -> None:
    rows = {
        "images": (source.images(clips[:3, 0]), source.dim),
        "clips": (source.clips(clips[:3]), source.clip_dim),
        "embed_images": (source.embed_images(clips[:3, 0]), source.embed_dim),
        "embed_clips": (source.embed_clips(clips[:3]), source.embed_dim),
        "embed_texts": (source.embed_texts([s.caption for s in SCENES[:3]]), source.embed_dim),
    }
    for name, (row, dim) in rows.items():
        assert row.shape == (3, dim), name
        assert row.dtype == torch.float32
        assert row.isfinite().all()


def test_a_row_does_not_depend_on_the_others(source: SpritesFeatures, clips: Tensor) -> None:
    texts = [s.caption for s in SCENES[:4]] + ["a red circle"]
    for read, items in ((source.images, clips[:5, 2]), (source.clips, clips[:5]), (source.embed_clips, clips[:5])):
        whole = read(items)
        assert torch.equal(torch.cat([read(items[3:]), read(items[:3])]).roll(3, 0), whole)
    assert torch.equal(torch.cat([source.embed_texts([text]) for text in texts]), source.embed_texts(texts))


def test_a_second_source_gives_the_same_bits(source: SpritesFeatures, clips: Tensor) -> None:
    assert torch.equal(SpritesFeatures().clips(clips[:3]), source.clips(clips[:3]))


def test_nothing_in_nothing_out(source: SpritesFeatures, clips: Tensor) -> None:
    assert source.images(clips[:0, 0]).shape == (0, source.dim)
    assert source.clips(clips[:0]).shape == (0, source.clip_dim)
    assert source.embed_texts([]).shape == (0, source.embed_dim)


def test_other_sizes_are_brought_to_64(source: SpritesFeatures, clips: Tensor) -> None:
    large = drawn(5, size=128)
    apart = (source.clips(large[:6]) - source.clips(clips[:6])).norm(dim=1).mean()
    between = torch.pdist(source.clips(clips)).mean()
    assert apart < 0.5 * between  # the same scenes, drawn finer


@pytest.mark.parametrize("frames", [1, 2, 8, 17])
def test_any_number_of_frames(source: SpritesFeatures, frames: int) -> None:
    assert source.clips(drawn(1, frames=frames)[:2]).isfinite().all()


def test_what_it_cannot_take_is_refused(source: SpritesFeatures, clips: Tensor) -> None:
    with pytest.raises(ConfigError, match="uint8"):
        source.images(clips[:2, 0].float())
    with pytest.raises(ConfigError, match=r"square frames, got 64x32"):
        source.clips(clips[:2, ..., :32])
    with pytest.raises(ConfigError, match=r"\[N, F, 3, H, H\]"):
        source.clips(clips[0])
    with pytest.raises(ConfigError, match="N, 3, H, W"):
        source.images(clips)
    with pytest.raises(ConfigError, match="list of strings"):
        source.embed_texts("a red circle")


def test_missing_files_and_devices_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="sprites-encoder"):
        SpritesFeatures(folder=tmp_path)
    with pytest.raises(ConfigError, match="nowhere"):
        SpritesFeatures(device="nowhere")


def test_unknown_words_are_counted(source: SpritesFeatures) -> None:
    assert source.text_notes([s.caption for s in HELD_OUT]) == ()
    (note,) = source.text_notes(["a red circle", "a photo of a dog"])
    assert note.startswith("1 of 2 texts")


@pytest.mark.parametrize("kind", ["noise", "blur", "repeat"])
def test_the_distance_rises_with_what_is_wrong(source: SpritesFeatures, clips: Tensor, kind: str) -> None:
    reference = Moments.from_features(source.clips(drawn(6)).numpy())
    distances = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        spoilt = degrade(clips.float() / 255, kind, strength, torch.Generator().manual_seed(0))
        seen = source.clips((spoilt * 255).round().to(torch.uint8)).numpy()
        distances.append(frechet_distance(reference, Moments.from_features(seen)))
    assert all(a < b for a, b in pairwise(distances)), distances


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_word_scores_less(source: SpritesFeatures, clips: Tensor, attribute: str) -> None:
    words = ATTRIBUTES[attribute]
    wrong = [replace(s, **{attribute: words[words.index(getattr(s, attribute)) - 1]}).caption for s in SCENES]
    own = cosine_similarity(source.embed_clips(clips), source.embed_texts([s.caption for s in SCENES]))
    other = cosine_similarity(source.embed_clips(clips), source.embed_texts(wrong))
    assert (own > other).float().mean() >= 0.95
    assert float((own - other).mean()) > 0.05


def test_one_frame_shows_colour_and_shape(source: SpritesFeatures, clips: Tensor) -> None:
    stills = sorted({s.still_caption for s in HELD_OUT})
    scores = cosine_similarity(
        source.embed_images(clips[:, 4]).unsqueeze(1), source.embed_texts(stills).unsqueeze(0), dim=2
    )
    seen = [stills[i] for i in scores.argmax(1).tolist()]
    assert sum(a == s.still_caption for a, s in zip(seen, SCENES, strict=True)) >= len(SCENES) - 1
