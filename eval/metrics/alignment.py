"""Do images match their prompts, and does a clip stay the same picture? Cosines in a space of texts and images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError

__all__ = ["clip_score", "clip_temporal_consistency"]

Floats = NDArray[np.float64]


def clip_score(image_embeds: NDArray[Any], text_embeds: NDArray[Any], scale: float = 100.0) -> Floats:
    """CLIP score of each item, [N]: `scale` times the cosine of image and text, not below 0.

    `image_embeds` is [N, D], or [N, F, D] for clips: then the mean over frames of each frame's score. `text_embeds` is
    [N, D]. Neither has to be normalised. A scale of 100 is what torchmetrics reports, 2.5 what the paper does. Texts
    that describe motion are judged frame by frame, so a CLIP score sees no motion. Raises ConfigError for shapes that
    do not belong together and for an embedding of zeros. Source: Hessel et al. 2021, section 3.
    """
    if image_embeds.ndim not in {2, 3} or text_embeds.ndim != 2 or 0 in image_embeds.shape:
        raise ConfigError(
            f"clip: embeddings must be [items, (frames,) dimensions] for images and [items, dimensions] for texts, "
            f"got {list(image_embeds.shape)} and {list(text_embeds.shape)}"
        )
    if len(image_embeds) != len(text_embeds) or image_embeds.shape[-1] != text_embeds.shape[-1]:
        raise ConfigError(
            f"clip: image embeddings {list(image_embeds.shape)} and text embeddings {list(text_embeds.shape)} differ "
            "in number or dimensions: one prompt for each item, both from one model"
        )
    frames = image_embeds.reshape(len(image_embeds), -1, image_embeds.shape[-1])
    cosines = np.einsum("nfd,nd->nf", _unit(frames, "image"), _unit(text_embeds, "text"))
    scores: Floats = (scale * np.maximum(cosines, 0.0)).mean(axis=1)
    return scores


def clip_temporal_consistency(frame_embeds: NDArray[Any]) -> float | None:
    """Mean cosine of the image embeddings [F, D] of neighbouring frames; None for one frame.

    Near 1 for every smooth clip, and 1 for a frozen one: read it beside motion. Raises ConfigError for another shape
    and for an embedding of zeros. Source: Esser et al. 2023, frame consistency.
    """
    if frame_embeds.ndim != 2 or 0 in frame_embeds.shape:
        raise ConfigError(f"clip_consistency: embeddings must be [frames, dimensions], got {list(frame_embeds.shape)}")
    unit = _unit(frame_embeds, "image")
    return float((unit[1:] * unit[:-1]).sum(axis=1).mean()) if len(unit) > 1 else None


def _unit(embeds: NDArray[Any], what: str) -> Floats:
    rows = np.asarray(embeds, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not lengths.all():
        raise ConfigError(
            f"{what} {int(np.flatnonzero(lengths == 0)[0])}: its embedding is all zeros, so it has no direction"
        )
    unit: Floats = rows / lengths
    return unit
