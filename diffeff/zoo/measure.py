"""Read a caption back from pixels, with image analysis only: no network is involved in judging a network.

The object is the largest saturated blob. Its mean hue names the colour, the overlap of its normalised
outline with three templates names the shape, its centroid track names the motion. A three-parameter
Gauss-Newton fit (dx, dy, log zoom) on everything else names the camera move.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.zoo.world import (
    ATTRIBUTES,
    COLOURS,
    DISPLACEMENT,
    PAN,
    REFERENCE_SIZE,
    SHAPES,
    ZOOM,
    Scene,
    object_rgb,
    signed_distance,
)

#: A move counts when it covers this fraction of its nominal amplitude.
MOVED = 0.4
_MIN_AREA = 0.008  # of the frame; the smallest object covers about 0.05
_MIN_CHROMA = 0.22  # the ground stays below 0.08
_TEMPLATE = 48


@dataclass(frozen=True, slots=True)
class Measured:
    """What is seen. A word is None where there is nothing to read: no object, or a single frame.

    `displacement` is the object's path (x, y) over the clip in pixels, `pan` the camera's (x, y) in pixels,
    `log_zoom` its log magnification over the clip, `overlap` the IoU with the winning outline.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    camera: str | None
    overlap: float = 0.0
    displacement: tuple[float, float] = (0.0, 0.0)
    pan: tuple[float, float] = (0.0, 0.0)
    log_zoom: float = 0.0


def adherence(scene: Scene, measured: Measured) -> dict[str, bool]:
    """Per attribute, whether what was measured is what the scene says; attributes not measured are left out
    only when a single frame cannot show them (motion, camera)."""
    words = {name: getattr(measured, name) for name in ATTRIBUTES}
    still = measured.motion is None and measured.camera is None
    shown = [name for name in ATTRIBUTES if not (still and name in {"motion", "camera"})]
    return {name: words[name] == getattr(scene, name) for name in shown}


def measure(frames: Tensor) -> Measured:
    """Measure one clip [F, 3, H, W] (or one image [3, H, W]) in [0, 1]. About 10 ms for 9x64x64 on a CPU.

    Raises:
        ValueError: the tensor has another shape or is not floating point.
    """
    clip = frames.unsqueeze(0) if frames.ndim == 3 else frames
    if clip.ndim != 4 or clip.shape[1] != 3 or not clip.is_floating_point():
        raise ValueError(f"measure needs float [F, 3, H, W] in [0, 1], got {tuple(frames.shape)} {frames.dtype}")
    clip = clip.detach().float().cpu().nan_to_num().clamp(0.0, 1.0)
    mask = object_mask(clip)
    visible = mask.float().flatten(1).mean(1) > _MIN_AREA
    colour = shape = motion = camera = None
    overlap, path = 0.0, (0.0, 0.0)
    if bool(visible.any()):
        colour = _colour(clip[visible], mask[visible])
        shape, overlap = _shape(mask[visible])
    if len(clip) == 1:
        return Measured(colour, shape, None, None, overlap)
    if int(visible.sum()) >= 2:
        path = _path(mask, visible)
        motion = _motion(path, clip.shape[-1])
    pan, log_zoom = camera_flow(clip, mask)
    camera = _camera(pan, log_zoom, clip.shape[-1])
    return Measured(colour, shape, motion, camera, overlap, path, pan, log_zoom)


def object_mask(clip: Tensor) -> Tensor:
    """The largest saturated blob of every frame: bool [F, H, W]."""
    chroma = clip.amax(1) - clip.amin(1)
    # Half of the object's own chroma: the outline then sits at the half-way point of a blurred edge.
    peak = chroma.flatten(1).quantile(0.98, dim=1).clamp(min=2 * _MIN_CHROMA)
    return _largest_component(chroma > 0.5 * peak.view(-1, 1, 1))


def _largest_component(mask: Tensor) -> Tensor:
    """Keep the largest 4-connected component of each [H, W] mask, by spreading labels until they settle."""
    count, height, width = mask.shape
    labels = torch.arange(1, height * width + 1).view(1, height, width) * mask
    while True:
        spread = _spread(_spread(labels, mask, 2), mask, 1)
        if torch.equal(spread, labels):
            break
        labels = spread
    kept = torch.zeros_like(mask)
    for i in range(count):
        names, sizes = torch.unique(labels[i][mask[i]], return_counts=True)
        if len(names):
            kept[i] = labels[i] == names[sizes.argmax()]
    return kept


def _spread(labels: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Give every unbroken run of the mask along `dim` the largest label in it."""
    lift = mask.logical_not().cumsum(dim) * (labels.shape[1] * labels.shape[2] + 1)  # a later run outranks
    ahead = (labels + lift).cummax(dim).values - lift
    lift = lift.amax(dim, keepdim=True) - lift
    back = (ahead + lift).flip(dim).cummax(dim).values.flip(dim) - lift
    return back * mask


def _colour(clip: Tensor, mask: Tensor) -> str:
    chroma = (clip.amax(1) - clip.amin(1)) * mask
    weight = chroma.square().unsqueeze(1)  # trust the interior over the blended outline
    mean = (clip * weight).sum((0, 2, 3)) / weight.sum()
    seen = mean - mean.mean()
    paints = torch.tensor([object_rgb(name) for name in COLOURS])
    paints = paints - paints.mean(1, keepdim=True)
    return COLOURS[int(F.cosine_similarity(paints, seen.unsqueeze(0)).argmax())]


def _centroids(mask: Tensor) -> Tensor:
    """Centres (x, y) in pixels, [F, 2]."""
    weight = mask.float()
    area = weight.sum((1, 2)).clamp(min=1.0)
    x = (weight.sum(1) * (torch.arange(mask.shape[2]) + 0.5)).sum(1) / area
    y = (weight.sum(2) * (torch.arange(mask.shape[1]) + 0.5)).sum(1) / area
    return torch.stack((x, y), dim=1)


def _normalised(mask: Tensor) -> Tensor:
    """Resample masks [F, H, W] to one scale and position: centroid in the middle, area 1/5 of the square."""
    height, width = mask.shape[1:]
    centre, area = _centroids(mask), mask.float().sum((1, 2)).clamp(min=1.0)
    half = (5.0 * area).sqrt() / 2
    axis = (torch.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 2 - 1
    x = (centre[:, 0, None] + half[:, None] * axis) / width * 2 - 1
    y = (centre[:, 1, None] + half[:, None] * axis) / height * 2 - 1
    grid = torch.stack((x[:, None, :].expand(-1, _TEMPLATE, -1), y[:, :, None].expand(-1, -1, _TEMPLATE)), dim=-1)
    return F.grid_sample(mask.float().unsqueeze(1), grid, align_corners=False).squeeze(1)


@functools.cache
def _templates() -> Tensor:
    axis = torch.arange(64) + 0.5 - 32
    masks = [signed_distance(s, axis.view(1, -1), axis.view(-1, 1), torch.tensor(11.5)) < 0 for s in SHAPES]
    return _normalised(torch.stack(masks))


def _shape(mask: Tensor) -> tuple[str, float]:
    seen = _normalised(mask).mean(0, keepdim=True)  # averaging frames removes pixel noise from the outline
    templates = _templates()
    iou = torch.minimum(seen, templates).sum((1, 2)) / torch.maximum(seen, templates).sum((1, 2))
    best = int(iou.argmax())
    return SHAPES[best], float(iou[best])


def _path(mask: Tensor, visible: Tensor) -> tuple[float, float]:
    """Least-squares path over the whole clip, from the frames where the object is visible."""
    t = torch.linspace(-0.5, 0.5, len(mask))[visible]
    where = _centroids(mask[visible])
    t = t - t.mean()
    slope = (t[:, None] * where).sum(0) / t.square().sum()
    return float(slope[0]), float(slope[1])


def _motion(path: tuple[float, float], size: int) -> str:
    x, y = path
    if max(abs(x), abs(y)) < MOVED * DISPLACEMENT * size / REFERENCE_SIZE:
        return "standing still"
    if abs(x) >= abs(y):
        return "moving right" if x > 0 else "moving left"
    return "moving down" if y > 0 else "moving up"


def camera_flow(clip: Tensor, mask: Tensor, iterations: int = 12) -> tuple[tuple[float, float], float]:
    """Camera move over the clip: pan (x, y) in pixels and log zoom, from the ground around the object.

    One move is fitted to all neighbouring frame pairs together: steady moves are what the captions name,
    and pooling nine frames makes the fit insensitive to the noise of any single one.
    """
    light = F.avg_pool2d(clip.mean(1, keepdim=True), 3, stride=1, padding=1, count_include_pad=False)
    blocked = F.max_pool2d(mask.float().unsqueeze(1), 9, stride=1, padding=4)
    fields = torch.cat((light, _slope(light, 3), _slope(light, 2), blocked), dim=1)[1:]
    sparse = (..., slice(0, None, 2), slice(0, None, 2))  # the ground is smooth: a quarter of it will do
    before, free = light[:-1][sparse], 1 - blocked[:-1][sparse]
    height, width = clip.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(0, height, 2) + 0.5 - height / 2, torch.arange(0, width, 2) + 0.5 - width / 2, indexing="ij"
    )
    step = torch.zeros(3)  # dx, dy of the ground and log zoom, per frame
    for i in range(iterations):
        seen, gx, gy, weight = _warp(fields, x, y, step)
        towards = torch.stack((gx, gy, gx * x + gy * y), dim=-1)
        error = seen - before
        # Geman-McClure weights: flicker and left-over object pixels must not steer the fit. They start wide,
        # because before the fit a true move looks like an outlier.
        tolerance = 0.3 if i < 4 else 0.08
        weight = weight * free / (1 + (error / tolerance).square()).square()
        weighted = (towards * weight.unsqueeze(-1)).flatten(0, -2)
        normal = weighted.T @ towards.flatten(0, -2)
        change = torch.linalg.solve(normal + torch.diag(torch.tensor([1e-3, 1e-3, 1e-1])), weighted.T @ error.flatten())
        step = step - change.clamp(-1.5, 1.5)
        if i >= 4 and float(change.abs().amax()) < 1e-3:
            break
    pairs = len(clip) - 1
    return (float(-step[0]) * pairs, float(-step[1]) * pairs), float(step[2]) * pairs


def _warp(fields: Tensor, x: Tensor, y: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look the later frames up where the move puts each pixel: brightness, its x and y slope, validity."""
    height, width = fields.shape[-2:]
    scale = torch.exp(step[2])
    u = (x * scale + step[0]) * 2 / width
    v = (y * scale + step[1]) * 2 / height
    grid = torch.stack((u, v), dim=-1).expand(len(fields), -1, -1, -1)
    seen = F.grid_sample(fields, grid, align_corners=False, padding_mode="border")
    inside = ((u.abs() < 1) & (v.abs() < 1)) & (seen[:, 3:] < 0.01)
    return seen[:, :1], seen[:, 1:2], seen[:, 2:3], inside.float()


def _slope(image: Tensor, dim: int) -> Tensor:
    """Central difference along `dim`."""
    return (torch.roll(image, -1, dim) - torch.roll(image, 1, dim)) / 2


def _camera(pan: tuple[float, float], log_zoom: float, size: int) -> str:
    sideways = pan[0] / (PAN * size / REFERENCE_SIZE)
    growth = log_zoom / math.log(ZOOM)
    if max(abs(sideways), abs(growth)) < MOVED:
        return "static"
    if abs(sideways) >= abs(growth):
        return "pans right" if sideways > 0 else "pans left"
    return "zooms in" if growth > 0 else "zooms out"
