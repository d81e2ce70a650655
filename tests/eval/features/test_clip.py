"""CLIP from a folder: the numbers against transformers, torchmetrics and a manual cosine; every file that can be wrong.

The CLIP here is real, tiny and random, saved by transformers itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffeff.errors import ConfigError, ModelLoadError
from diffeff.eval.features.clip import ClipFeatures
from diffeff.eval.features.preprocess import ClipPreparation
from diffeff.eval.features.source import ClipSource, FeatureSource, TextImageSource
from diffeff.eval.metrics.alignment import clip_score
from diffeff.eval.metrics.perceptual import MapSource, perceptual

TEXTS = ["a red circle", "two blue dogs", "a"]
CONTEXT = 16


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), generator=random).to(torch.uint8)


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: place for place, word in enumerate(words)}


def save_clip(folder: Path, *, image_size: int = 32) -> Path:
    """A CLIP folder as the hub has it: config, weights, image processor, tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = _vocabulary()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    vision = {**sizes, "image_size": image_size, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for weight in model.parameters():
        weight.data.mul_(8)  # the tiny initialisation would leave all cosines at 1
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def source(folder: Path) -> ClipFeatures:
    return ClipFeatures(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _processor(folder: Path) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil.from_pretrained(folder)


def _model(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder).eval()


def _tokens(folder: Path, texts: list[str]) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")


def test_is_a_source_of_images_and_texts_that_says_what_it_is(source: ClipFeatures, folder: Path) -> None:
    assert isinstance(source, FeatureSource)
    assert isinstance(source, TextImageSource)
    assert isinstance(source, MapSource)
    assert not isinstance(source, ClipSource)
    facts = source.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["label"] == "CLIP-ViT-w16-8-32"
    assert facts["spec"] == f"clip:{folder}"
    assert facts["resize"] == "bicubic, antialiased (Pillow), short side"
    assert {"sha256", "dim", "size", "resize", "crop", "mean", "std"} <= facts.keys()
    assert source.dim == source.embed_dim == 12
    assert source.text_scale == 100


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 61), (90, 33), (8, 20), (200, 300)])
def test_pixels_are_prepared_as_transformers_does(source: ClipFeatures, folder: Path, height: int, width: int) -> None:
    frames = picture(height, width)
    theirs = _processor(folder)(images=[frame.numpy() for frame in frames], return_tensors="pt")["pixel_values"]
    assert torch.allclose(source._prepare(frames), theirs, atol=1e-5)


def test_embeddings_are_those_of_the_model(source: ClipFeatures, folder: Path) -> None:
    frames = torch.cat([picture(40, 50, seed) for seed in range(3)])
    with torch.no_grad():
        theirs = _model(folder)(pixel_values=source._prepare(frames), **_tokens(folder, TEXTS))
    images, texts = source.images(frames), source.embed_texts(TEXTS)
    assert torch.allclose(torch.nn.functional.normalize(images), theirs.image_embeds, atol=1e-5)
    assert torch.allclose(torch.nn.functional.normalize(texts), theirs.text_embeds, atol=1e-5)


def test_a_score_is_the_manual_cosine(source: ClipFeatures) -> None:
    images = source.embed_images(torch.cat([picture(40, 50, seed) for seed in range(3)])).double()
    texts = source.embed_texts(TEXTS).double()
    manual = [
        100 * max(0.0, float(image @ text / (image.norm() * text.norm())))
        for image, text in zip(images, texts, strict=True)
    ]
    assert max(manual) > 0
    assert np.allclose(clip_score(images.numpy(), texts.numpy(), source.text_scale), manual)


class _Wrapped:
    """transformers 5 returns an object where torchmetrics 1.9 expects a tensor."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> _Wrapped:
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.get_image_features(pixels).pooler_output
        return found

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.model.get_text_features(tokens, mask).pooler_output
        return found


def test_a_score_is_that_of_torchmetrics(source: ClipFeatures, folder: Path) -> None:
    functional = pytest.importorskip("torchmetrics.functional.multimodal")
    from transformers import CLIPProcessor, CLIPTokenizer

    processor = CLIPProcessor(_processor(folder), CLIPTokenizer.from_pretrained(folder))
    frames = torch.cat([picture(40, 50, seed) for seed in range(3)])
    with torch.no_grad():
        theirs = functional.clip_score(list(frames), TEXTS, lambda: (_Wrapped(_model(folder)), processor))
    images, texts = source.embed_images(frames), source.embed_texts(TEXTS)
    cosines = 100 * torch.nn.functional.cosine_similarity(images, texts)
    assert float(cosines.mean().clamp(min=0)) == pytest.approx(float(theirs), abs=1e-3)


def test_a_row_depends_on_its_own_item_only(source: ClipFeatures) -> None:
    frames = torch.cat([picture(40, 50, seed) for seed in range(3)])
    assert torch.equal(source.images(frames)[1:2], source.images(frames[1:2]))
    assert torch.equal(source.embed_texts(TEXTS)[2:], source.embed_texts(TEXTS[2:]))
    assert source.images(frames[:0]).shape == source.embed_texts([]).shape == (0, 12)


def test_padding_of_a_batch_changes_no_text(source: ClipFeatures) -> None:
    with torch.no_grad():
        assert torch.allclose(source._read(TEXTS), source.embed_texts(TEXTS), atol=1e-5)


def test_long_texts_are_cut_and_counted(source: ClipFeatures) -> None:
    long = " ".join("abcdefghijklmnopqrstuvwxyz")
    first = " ".join("abcdefghijklmn")  # with begin and end it fills the context
    assert source.text_tokens == CONTEXT
    assert torch.equal(source.embed_texts([long]), source.embed_texts([first]))
    assert source.text_notes([long, first, "a"]) == (f"1 of 3 texts are longer than {CONTEXT} tokens and were cut",)
    assert source.text_notes(TEXTS) == source.text_notes([]) == ()


def test_maps_serve_a_perceptual_distance(source: ClipFeatures) -> None:
    assert [list(found.shape) for found in source.maps(picture(40, 40))] == [[1, 16, 4, 4]] * 3
    clip = picture(40, 40)[0].permute(1, 2, 0).numpy()[None]
    assert perceptual(clip, clip, source) == 0
    assert perceptual(clip, 255 - clip, source) > 0


@pytest.mark.parametrize("texts", ["one string", [1], [None]])
def test_texts_that_are_no_list_of_strings_are_refused(source: ClipFeatures, texts: Any) -> None:
    with pytest.raises(ConfigError, match="string"):
        source.embed_texts(texts)


def test_floats_are_refused(source: ClipFeatures) -> None:
    with pytest.raises(ConfigError, match="need uint8 frames"):
        source.images(picture(8, 8).float())


def test_the_checksum_covers_weights_preparation_and_tokenizer(copy: Path, source: ClipFeatures) -> None:
    assert ClipFeatures(copy).sha256 == source.sha256
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        assert ClipFeatures(copy).sha256 != source.sha256


def test_other_layouts_of_the_hub_are_read(copy: Path, source: ClipFeatures) -> None:
    from safetensors.torch import load_file

    nested = {"image_processor": json.loads((copy / "preprocessor_config.json").read_text())}
    (copy / "processor_config.json").write_text(json.dumps(nested))
    (copy / "preprocessor_config.json").unlink()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    vocabulary = _vocabulary()
    (copy / "vocab.json").write_text(json.dumps(vocabulary))
    (copy / "merges.txt").write_text("#version: 0.2\n")
    (copy / "tokenizer.json").unlink()
    found = ClipFeatures(copy)
    assert torch.equal(found.images(picture(40, 50)), source.images(picture(40, 50)))
    assert torch.equal(found.embed_texts(TEXTS), source.embed_texts(TEXTS))


def test_shards_are_read_and_a_missing_one_is_named(folder: Path, copy: Path, source: ClipFeatures) -> None:
    (copy / "model.safetensors").unlink()
    _model(folder).save_pretrained(copy, max_shard_size="20KB")
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(ClipFeatures(copy).images(picture(40, 50)), source.images(picture(40, 50)))
    shards[0].unlink()
    with pytest.raises(ModelLoadError, match=f"lacks {shards[0].name}"):
        ClipFeatures(copy)


def test_all_missing_files_are_named_at_once(copy: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        (copy / name).unlink()
    with pytest.raises(
        ModelLoadError, match=r"lacks model\.safetensors.*, preprocessor_config\.json.*, tokenizer\.json"
    ):
        ClipFeatures(copy)


def test_a_missing_folder_and_an_unknown_hub_name_are_clear(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no folder .*A CLIP folder holds"):
        ClipFeatures(tmp_path / "absent")
    with pytest.raises(ModelLoadError, match=r"cannot be had as a model of the hub.*A CLIP folder holds"):
        ClipFeatures("nobody/no-such-clip")
    with pytest.raises(ModelLoadError, match="cannot be had"):
        ClipFeatures("no such name!")


def test_a_hub_id_is_found_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    place = tmp_path / "models--somebody--tiny-clip"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    found = ClipFeatures("somebody/tiny-clip")
    assert found.spec == "clip:somebody/tiny-clip"
    assert found.sha256 == ClipFeatures(folder).sha256
    (place / "snapshots" / commit / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks tokenizer\.json"):
        ClipFeatures("somebody/tiny-clip")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_damaged_file_is_one_clear_error(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match=r"cannot be loaded|not readable JSON"):
        ClipFeatures(copy)


def test_weights_that_lack_a_layer_are_not_filled_with_random_numbers(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lack visual_projection\.weight"):
        ClipFeatures(copy)


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ModelLoadError, match="type 'siglip', not 'clip'"):
        ClipFeatures(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": 24}, "cut to .*24.*takes 32x32"),
        ({"crop_size": 48}, "does not fit"),
        ({"do_resize": False}, "switches do_resize off"),
        ({"image_mean": [1, 2]}, "does not describe"),
        ({"size": {"longest_edge": 3}}, "does not describe"),
        ({"resample": 99}, "does not describe"),
    ],
)
def test_a_preparation_that_does_not_fit_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelLoadError, match=message):
        ClipFeatures(copy)


def test_a_preparation_without_aspect() -> None:
    made = ClipPreparation.from_config(
        {"size": {"height": 8, "width": 12}, "crop_size": {"height": 8, "width": 8}}, "x"
    )
    assert made(picture(30, 30)).shape == (1, 3, 8, 8)
    assert made.describe()["resize"].endswith("both sides, aspect not kept")
    assert made.describe()["size"] == [8, 12]
