"""`clip:DIR_OR_ID`: images and texts in one space, from a CLIP in the Hugging Face layout.

Everything is read from a local folder; a hub id is first fetched, or found in the hub's cache when offline. The
projections are computed from the parts of the model, so no version of transformers can change what is returned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffeff.errors import ConfigError, ModelLoadError
from diffeff.eval.features.preprocess import ClipPreparation, check_frames, device_of, exactly, in_batches, reason
from diffeff.files import sha256

__all__ = ["ClipFeatures"]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_PREPARATION = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "vocab.json")
_NEEDS = (("config.json",), _WEIGHTS, _PREPARATION, _TOKENIZER)
"""What a folder must hold: one file of each row."""
_EXPECTED = (
    "A CLIP folder holds config.json, model.safetensors (or pytorch_model.bin), preprocessor_config.json (or "
    "processor_config.json) and tokenizer.json (or vocab.json and merges.txt)"
)


class ClipFeatures:
    """CLIP embeddings of images and texts, not normalised: CLIP score, CMMD, and Frechet distances over CLIP.

    `where` is a folder or a hub id. The label names the architecture (`CLIP-ViT-L-14-336`), since two CLIPs share no
    scale. Raises ModelLoadError for files that are missing, damaged or of another kind of model, ConfigError for a
    device that is not there. Costs: one vision pass per image, one text pass per text; float32 throughout.
    """

    text_scale = 100.0

    def __init__(self, where: str | Path, *, device: str | torch.device = "cpu") -> None:
        self.spec = f"clip:{where}"
        self._device = device_of(device)
        folder = _folder(str(where))
        files = _files(folder)
        self._prepare = ClipPreparation.from_config(*_preparation(files))
        self._model = _model(folder, files).to(self._device)
        self._tokenizer = _tokenizer(folder)
        self.sha256 = _combined(files)
        self.dim = self.embed_dim = int(self._model.config.projection_dim)
        self.label = f"CLIP-{self.architecture}"
        self._check_size(folder)

    @property
    def architecture(self) -> str:
        """`ViT-B-32`, `ViT-L-14-336`: the published names; other widths are spelled out."""
        vision = self._model.config.vision_config
        size = {768: "B", 1024: "L", 1280: "H", 1664: "bigG"}.get(vision.hidden_size, f"w{vision.hidden_size}")
        tail = "" if vision.image_size == 224 else f"-{vision.image_size}"
        return f"ViT-{size}-{vision.patch_size}{tail}"

    @property
    def text_tokens(self) -> int:
        """How many tokens of a text the model can read, its begin and end included (77 for CLIP)."""
        return int(self._model.config.text_config.max_position_embeddings)

    def images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, dim]. Raises ConfigError for frames of another type or shape."""
        check_frames(frames, self.spec)
        return in_batches(frames, self._see, dim=self.dim, device=self._device, spec=self.spec)

    def embed_images(self, frames: Tensor) -> Tensor:
        """The same as `images`: CLIP's features are its embedding."""
        return self.images(frames)

    def maps(self, frames: Tensor) -> list[Tensor]:
        """uint8 [N, 3, H, W] to up to four maps [N, C, h, w] of patches, from evenly spaced layers, the last included.

        For an LPIPS-style distance; C is the width of the transformer, h and w the patches along a side.
        """
        check_frames(frames, self.spec)
        with exactly():
            pixels = self._prepare(frames).to(self._device)
            states = self._model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
        chosen = {-(-len(states) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}
        side = math.isqrt(states[0].shape[1] - 1)
        return [states[layer][:, 1:].mT.unflatten(2, (side, side)) for layer in sorted(chosen)]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to float32 [N, dim]; what is beyond `text_tokens` is cut off, which `text_notes` says."""
        wrong = [text for text in texts if not isinstance(text, str)]
        if isinstance(texts, str) or wrong:
            raise ConfigError(f"texts must be a list of strings, got {wrong[0]!r}" if wrong else "got one string")
        return in_batches(list(texts), self._read, dim=self.dim, device=self._device, spec=self.spec)

    def text_notes(self, texts: Sequence[str]) -> tuple[str, ...]:
        """What a reader of a text score must know: how many texts were too long to be read whole."""
        tokens = self._tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        long = sum(len(row) > self.text_tokens for row in tokens)
        return (f"{long} of {len(texts)} texts are longer than {self.text_tokens} tokens and were cut",) if long else ()

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the model, its checksum, and how pixels and texts are prepared."""
        return {
            "spec": self.spec,
            "label": self.label,
            "sha256": self.sha256,
            "dim": self.dim,
            "architecture": self.architecture,
            "text_tokens": self.text_tokens,
            **self._prepare.describe(),
        }

    def _see(self, frames: Tensor) -> Tensor:
        pooled = self._model.vision_model(pixel_values=self._prepare(frames).to(self._device)).pooler_output
        projected: Tensor = self._model.visual_projection(pooled)
        return projected

    def _read(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.text_tokens, return_tensors="pt"
        ).to(self._device)
        pooled = self._model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        projected: Tensor = self._model.text_projection(pooled)
        return projected

    def _check_size(self, folder: Path) -> None:
        side = self._model.config.vision_config.image_size
        if self._prepare.crop != (side, side):
            raise ModelLoadError(f"{folder}: images are cut to {self._prepare.crop}, the model takes {side}x{side}")


def _folder(where: str) -> Path:
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1:
        raise ModelLoadError(f"there is no folder {path}. {_EXPECTED}.")
    return _fetched(where)


def _fetched(name: str) -> Path:
    """The hub's snapshot of these files, downloaded or, offline, from its cache."""
    from huggingface_hub import snapshot_download

    wanted = [file for row in _NEEDS for file in row if file != "pytorch_model.bin"] + ["model-*.safetensors"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*wanted, "merges.txt"]))
        if not any((folder / file).exists() for file in _WEIGHTS):
            folder = Path(snapshot_download(name, allow_patterns=["pytorch_model.bin"]))
    except Exception as error:  # names the hub refuses, and whatever its HTTP client raises
        raise ModelLoadError(
            f"there is no folder {name}, and it cannot be had as a model of the hub: {reason(error)}. "
            f"{_EXPECTED}; without network give the path of one."
        ) from error
    return folder


def _files(folder: Path) -> dict[str, Path]:
    """The files that are used, by name. Raises ModelLoadError naming all that are missing at once."""
    found = {row: [name for name in row if (folder / name).is_file()] for row in _NEEDS}
    missing = [" or ".join(row) for row in _NEEDS if not found[row]]
    if found[_TOKENIZER] == ["vocab.json"] and not (folder / "merges.txt").is_file():
        missing.append("merges.txt")
    if missing:
        raise ModelLoadError(f"{folder} lacks {', '.join(missing)}. {_EXPECTED}.")
    names = [found[row][0] for row in (*_NEEDS[:2], _PREPARATION)] + found[_TOKENIZER] + ["merges.txt"]
    files = {name: folder / name for name in names if (folder / name).is_file()}
    return files | _shards(folder, files)


def _shards(folder: Path, files: dict[str, Path]) -> dict[str, Path]:
    index = files.get("model.safetensors.index.json")
    names = sorted(set(_json(index)["weight_map"].values())) if index else []
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelLoadError(f"{folder} lacks {', '.join(missing)}, which {index} names")
    return {name: folder / name for name in names}


def _combined(files: dict[str, Path]) -> str:
    """One checksum of everything that decides a feature: weights, configuration, preparation, tokenizer."""
    lines = "".join(f"{name} {sha256(path)}\n" for name, path in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} holds no JSON object")
    return data


def _preparation(files: dict[str, Path]) -> tuple[dict[str, Any], str]:
    """The image processor's settings and the file they are from; transformers 5 nests them."""
    path = next(files[name] for name in _PREPARATION if name in files)
    data = _json(path)
    return data.get("image_processor", data), str(path)


def _model(folder: Path, files: dict[str, Path]) -> Any:
    from transformers import CLIPModel

    kind = _json(files["config.json"]).get("model_type")
    if kind != "clip":
        raise ModelLoadError(f"{folder} holds a model of type {kind!r}, not 'clip'. {_EXPECTED}.")
    try:
        with _no_progress_bars():
            found: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # damaged weights surface as whatever their reader raises
        raise ModelLoadError(f"{folder} cannot be loaded ({reason(error)}): fetch it again") from error
    model, loading = found
    if loading["missing_keys"]:
        raise ModelLoadError(f"{folder}: the weights lack {', '.join(sorted(loading['missing_keys'])[:3])}")
    for weight in model.parameters():  # mapped from the file at odd addresses, which changes the last bits of results
        weight.data = weight.data.clone()
    return model.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ModelLoadError(f"{folder}: the tokenizer cannot be loaded ({reason(error)})") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
