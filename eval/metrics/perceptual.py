"""LPIPS-style distance over a backbone of the user's: where two pictures differ to a network, not to a ruler.

There are no learned weights here: LPIPS proper needs its own heads on its own networks, so these numbers are labelled
`LPIPS-style, unweighted` and are never to be compared with published LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.fidelity import Floats, Pixels

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MapSource", "perceptual", "perceptual_per_frame", "unweighted"]

_EPS = 1e-10


@runtime_checkable
class MapSource(Protocol):
    """A backbone that shows its layers."""

    def maps(self, frames: Tensor) -> Sequence[Tensor]:
        """uint8 [N, 3, H, W] to one feature map [N, C, h, w] for each layer; any number of layers, C, h and w."""
        ...


def perceptual(reference: Pixels, other: Pixels, backbone: MapSource, batch: int = 16) -> float:
    """LPIPS-style, unweighted distance of two uint8 clips, the mean over frames; 0 when identical."""
    return float(perceptual_per_frame(reference, other, backbone, batch).mean())


def perceptual_per_frame(reference: Pixels, other: Pixels, backbone: MapSource, batch: int = 16) -> Floats:
    """LPIPS-style, unweighted distance of every frame, [F]; clips are uint8 [F, H, W, 3].

    `batch` frames of each clip are in the backbone at once. Raises ConfigError for clips that are not uint8 or not of
    one shape, and for a backbone that returns something else than feature maps.
    """
    for clip in (reference, other):
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or len(clip) == 0:
            raise ConfigError(f"lpips takes clips as uint8 [F, H, W, 3], got {clip.dtype} {list(clip.shape)}")
    if reference.shape != other.shape:
        raise ConfigError(f"lpips needs clips of one shape, got {reference.shape} and {other.shape}")
    parts = [
        unweighted(_maps(backbone, reference[at : at + batch]), _maps(backbone, other[at : at + batch]))
        for at in range(0, len(reference), batch)
    ]
    return np.concatenate(parts)


def unweighted(reference: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> Floats:
    """Distance [N] of feature maps, one [N, C, h, w] for each layer.

    At each position the channels are scaled to length 1; the squared difference is summed over channels, averaged over
    positions, and summed over layers: between 0 and 4 for each layer. Raises ConfigError for layers that differ in
    number or shape. Source: Zhang et al. 2018, equation 1 with all weights 1 (their baseline without learned heads).
    """
    if len(reference) != len(other) or not reference:
        raise ConfigError(f"lpips needs the same layers of both, at least one, got {len(reference)} and {len(other)}")
    total = np.zeros(len(reference[0]))
    for layer, (a, b) in enumerate(zip(reference, other, strict=True)):
        if a.shape != b.shape or a.ndim != 4 or 0 in a.shape:
            raise ConfigError(
                f"lpips: layer {layer} has maps of shape {a.shape} and {b.shape}: both must be [N, C, h, w], equal"
            )
        total += ((_unit(a) - _unit(b)) ** 2).sum(axis=1).mean(axis=(1, 2))
    return total


def _unit(maps: NDArray[Any]) -> Floats:
    wide = np.asarray(maps, dtype=np.float64)
    unit: Floats = wide / (np.linalg.norm(wide, axis=1, keepdims=True) + _EPS)
    return unit


def _maps(backbone: MapSource, frames: Pixels) -> list[NDArray[Any]]:
    import torch

    with torch.inference_mode():
        found = backbone.maps(torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))))
    if not all(isinstance(layer, torch.Tensor) for layer in found):
        raise ConfigError("lpips: the backbone must return one tensor [N, C, h, w] for each layer")
    return [layer.float().cpu().numpy() for layer in found]
