"""How steady a clip is: change from frame to frame, how much moves, and what the motion does not explain.

Optical flow is OpenCV's Dense Inverse Search (Kroeger, Timofte, Dai, Van Gool 2016), medium preset refined to single
pixels; it needs no weights. A clip is `[F, H, W, 3]`, floating point in [0, 1] or uint8. A still has no time in it:
every figure is None for a clip of one frame. Only two frames are in float64 at a time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.metrics.fidelity import Floats, Pixels, check_clip, unit_pixels

__all__ = ["flicker", "flicker_per_frame", "flow", "motion_magnitude", "motion_per_frame", "warping_error"]

Flow = NDArray[np.float32]

SMALLEST = 12
"""Shortest side, in pixels, of a frame whose flow can be found: one patch of the search and its neighbours."""


def flicker(clip: Pixels) -> float | None:
    """Mean absolute difference of neighbouring frames, as a share of white: 0 for a frozen clip.

    Motion counts as well as flicker, so compare clips of the same scene. It is one minus VBench's temporal flickering
    score (Huang et al. 2024), which is meant for scenes that stand still. None for one frame.
    """
    changes = flicker_per_frame(clip)
    return float(changes.mean()) if len(changes) else None


def flicker_per_frame(clip: Pixels) -> Floats:
    """Mean absolute difference of each frame from the one before it, [F - 1]."""
    check_clip(clip)
    return np.array([np.abs(unit_pixels(b) - unit_pixels(a)).mean() for a, b in pairwise(clip)], np.float64)


def motion_magnitude(clip: Pixels) -> float | None:
    """Mean length of the optical flow, in pixels of this clip per frame; None for one frame.

    Motion is seen where there is something to see: flat areas take the motion of what surrounds them. A step beyond
    about a tenth of the frame may be missed. Raises ConfigError for frames smaller than 12 pixels.
    """
    lengths = motion_per_frame(clip)
    return float(lengths.mean()) if len(lengths) else None


def motion_per_frame(clip: Pixels) -> Floats:
    """Mean length of the flow from each frame to the next, in pixels, [F - 1]."""
    check_clip(clip)
    greys = map(_grey, clip)
    return np.array([np.linalg.norm(flow(a, b), axis=2).mean() for a, b in pairwise(greys)], np.float64)


def warping_error(clip: Pixels, reference: Pixels | None = None) -> float | None:
    """Mean absolute difference, as a share of white, between each frame and the next one moved back by the flow.

    What motion explains does not count: a smooth pan is near 0, flicker and boiling texture are not. Flow is taken
    from `reference` when one is given (the plain run, say), so that an artefact cannot explain itself. Pixels that
    leave the frame or are hidden in the next one do not count, by the forward-backward check of Ruder, Dosovitskiy,
    Brox 2016. The measure is that of Lai et al. 2018, with absolute for squared differences.

    None for one frame, and when no pixel of any pair can be followed. Costs two flows a pair of frames.
    Raises ConfigError for a reference of another shape and for frames smaller than 12 pixels.
    """
    if reference is not None and reference.shape != clip.shape:
        raise ConfigError(f"warping_error needs arrays of one shape, got {reference.shape} and {clip.shape}")
    check_clip(clip)
    greys = map(_grey, clip if reference is None else reference)
    pairs = zip(pairwise(clip), pairwise(greys), strict=True)
    errors = [_pair_error(unit_pixels(now), unit_pixels(then), *grey) for (now, then), grey in pairs]
    seen = [error for error in errors if error is not None]
    return float(np.mean(seen)) if seen else None


def flow(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Flow:
    """Optical flow [H, W, 2] between two grey frames [H, W]: the pixel at (x, y) is seen at (x, y) + flow next.

    Raises ConfigError for frames smaller than 12 pixels.
    """
    import cv2

    if min(before.shape) < SMALLEST:
        raise ConfigError(
            f"optical flow needs frames of at least {SMALLEST} x {SMALLEST} pixels, got {before.shape[0]} x "
            f"{before.shape[1]}: leave out motion and warping_error"
        )
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)  # the preset stops at half size, which small clips cannot afford
    found: Flow = search.calc(np.ascontiguousarray(before), np.ascontiguousarray(after), None)
    return found


def _grey(frame: Pixels) -> NDArray[np.uint8]:
    import cv2

    pixels = (np.nan_to_num(unit_pixels(frame)).clip(0, 1) * 255).round().astype(np.uint8)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)


def _pair_error(now: Floats, then: Floats, grey: NDArray[np.uint8], grey_then: NDArray[np.uint8]) -> float | None:
    forward, backward = flow(grey, grey_then), flow(grey_then, grey)
    followed = _followed(forward, backward)
    if not followed.any():
        return None
    return float(np.abs(now - _fetch(then, forward))[followed].mean())


def _followed(forward: Flow, backward: Flow) -> NDArray[np.bool_]:
    """Pixels whose way there and back ends where it began, inside the frame."""
    height, width = forward.shape[:2]
    x, y = _targets(forward)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    back = _fetch(backward, forward)
    gap = ((forward + back) ** 2).sum(axis=2)
    lengths = (forward**2).sum(axis=2) + (back**2).sum(axis=2)
    kept: NDArray[np.bool_] = inside & (gap <= 0.01 * lengths + 0.5)
    return kept


def _targets(forward: Flow) -> tuple[Flow, Flow]:
    rows, columns = np.indices(forward.shape[:2], dtype=np.float32)
    return columns + forward[..., 0], rows + forward[..., 1]


def _fetch(image: NDArray[Any], forward: Flow) -> NDArray[Any]:
    """What `image` shows at each pixel's target, bilinear; a target outside takes the border."""
    import cv2

    x, y = _targets(forward)
    fetched: NDArray[Any] = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return fetched
