"""Where features come from. Numbers from different sources are never comparable, so every source says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["ClipSource", "FeatureSource", "TextImageSource"]


@runtime_checkable
class FeatureSource(Protocol):
    """Features of single images.

    `spec` is what the user wrote (`sprites`, `clip:/models/clip`), `label` what stands in a metric's name
    (`FID-sprites`), `sha256` the checksum of the weights (or of the function's source), `dim` the length of a vector.
    """

    spec: str
    label: str
    sha256: str
    dim: int

    def images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, dim]. One row per image, not depending on the other rows."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """JSON-ready: spec, label, sha256, dim, and how pixels are prepared (size, resize, crop, mean, std)."""
        ...


@runtime_checkable
class ClipSource(Protocol):
    """A source that sees motion: features of whole clips."""

    clip_dim: int

    def clips(self, clips: Tensor) -> Tensor:
        """uint8 [N, F, 3, H, W] to float32 [N, clip_dim]."""
        ...


@runtime_checkable
class TextImageSource(Protocol):
    """A source with texts and images in one space, as CLIP has: the cosine of the two is the score."""

    embed_dim: int
    text_scale: float  # CLIP score = text_scale * max(cos, 0): 100 for CLIP (Hessel et al. 2021 use 2.5)

    def embed_images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, embed_dim], not normalised."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to float32 [N, embed_dim], not normalised."""
        ...
