"""`sprites`: features of the bundled world, shipped with the package, so that an evaluation needs no download.

The encoder (`diffeff.zoo.encoder`) knows coloured shapes on a lit stage and nothing else: its numbers compare
versions of the bundled models with each other, and never with an Inception or CLIP number of anybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.errors import ConfigError
from diffeff.eval.features.preprocess import check_frames, device_of, in_batches
from diffeff.files import sha256
from diffeff.zoo.encoder import FOLDER, SIZE, load_encoder, word_ids

__all__ = ["SpritesFeatures"]


class SpritesFeatures:
    """Features of frames and of whole clips, and texts in one space with both: a FeatureSource, a ClipSource and a
    TextImageSource, trained on the bundled world only.

    A score of a text and a video takes `embed_clips`: one frame shows neither motion nor camera. Raises
    ModelLoadError where the encoder's files are missing, ConfigError for a device that is not there. Costs about
    3 ms a frame and 10 ms a clip of 9 frames on one CPU core.
    """

    text_scale = 100.0

    def __init__(self, *, device: str | torch.device = "cpu", folder: Path = FOLDER) -> None:
        self.spec = self.label = "sprites"
        self._device = device_of(device)
        self._encoder = load_encoder(folder, self._device)
        self.sha256 = sha256(folder / "model.safetensors")
        config = self._encoder.config
        self.dim, self.clip_dim, self.embed_dim = config.frame_dim, config.clip_dim, config.embed_dim

    def images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, H] to float32 [N, dim], of about unit variance over clean and spoilt frames.

        Raises ConfigError for frames of another type, and for frames that are not square.
        """
        return self._of_frames(frames, features=True)

    def embed_images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, H] to float32 [N, embed_dim]: what one frame shows, colour and shape."""
        return self._of_frames(frames, features=False)

    def clips(self, clips: Tensor) -> Tensor:
        """uint8 [N, F, 3, H, H] to float32 [N, clip_dim]. Any number of frames; it was trained on 5 to 13."""
        return self._of_clips(clips, features=True)

    def embed_clips(self, clips: Tensor) -> Tensor:
        """uint8 [N, F, 3, H, H] to float32 [N, embed_dim]: what the clip shows, motion and camera included."""
        return self._of_clips(clips, features=False)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions of the world, whole or in part (`a red circle`), to float32 [N, embed_dim].

        Words it does not know, and those after the 31st, say nothing to it: see `text_notes`.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"features 'sprites' need a list of strings as texts, got {texts!r:.80}")
        return in_batches(list(texts), self._read, dim=self.embed_dim, device=self._device, spec=self.spec)

    def text_notes(self, texts: Sequence[str]) -> tuple[str, ...]:
        """What a reader of a text score must know: how many texts have words that the encoder does not know."""
        strange = sum(count > 0 for count in word_ids(texts, self._encoder.config.words)[1])
        if not strange:
            return ()
        return (f"{strange} of {len(texts)} texts have words that are not of the bundled world; they are not read",)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the encoder, its checksum, and how pixels are prepared."""
        return {
            "spec": self.spec,
            "label": self.label,
            "sha256": self.sha256,
            "dim": self.dim,
            "clip_dim": self.clip_dim,
            "embed_dim": self.embed_dim,
            "size": SIZE,
            "resize": "bilinear, antialiased (torch), square frames only; frames of this size are taken as they are",
            "crop": None,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "trained_on": "the bundled world of diffeff.zoo.world only; not comparable with FID over Inception",
        }

    def _of_frames(self, frames: Tensor, *, features: bool) -> Tensor:
        check_frames(frames, self.spec)
        self._check_square(frames)

        def see(part: Tensor) -> Tensor:
            return self._encoder.encode_frames(_prepared(part, self._device))[0 if features else 1]

        return in_batches(
            frames, see, dim=self.dim if features else self.embed_dim, device=self._device, spec=self.spec
        )

    def _of_clips(self, clips: Tensor, *, features: bool) -> Tensor:
        if clips.ndim != 5 or clips.shape[1] < 1:
            raise ConfigError(f"clip features of 'sprites' need clips [N, F, 3, H, H], got {list(clips.shape)}")
        check_frames(clips.flatten(0, 1), self.spec)
        self._check_square(clips)

        def see(part: Tensor) -> Tensor:
            pixels = _prepared(part.flatten(0, 1), self._device).unflatten(0, part.shape[:2])
            return self._encoder.encode_clips(pixels)[0 if features else 1]

        dim = self.clip_dim if features else self.embed_dim
        return in_batches(clips, see, dim=dim, device=self._device, spec=self.spec)

    def _check_square(self, pixels: Tensor) -> None:
        height, width = pixels.shape[-2:]
        if height != width:
            raise ConfigError(
                f"features 'sprites' need square frames, got {height}x{width}. They are made for the bundled models; "
                "for other pictures use clip:DIR or inception:PATH, or cut squares first."
            )

    def _read(self, texts: list[str]) -> Tensor:
        return self._encoder.encode_texts(word_ids(texts, self._encoder.config.words)[0].to(self._device))


def _prepared(frames: Tensor, device: torch.device) -> Tensor:
    """uint8 [N, 3, H, H] to float32 [N, 3, 64, 64] in [0, 1]."""
    pixels = frames.to(device).float() / 255
    if pixels.shape[-1] == SIZE:
        return pixels
    return F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
