"""A procedural world of captioned clips: one coloured object on a lit stage, filmed by a moving camera.

Everything a caption says can be read back from the pixels (`diffeff.zoo.measure`), so a model trained on
this world can be scored exactly. The object moves in *screen* coordinates and the camera moves only the
background: each word of the caption owns one visible thing, and unseen combinations are compositions.

The stage is the same place in every clip (a few broad pools of light at fixed positions, jittered by a few
pixels) under a random floor texture. The fixed part makes camera moves visible at low frequencies, where a
small autoencoder and the noisy steps of a sampler can carry them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "magenta")
SHAPES: tuple[str, ...] = ("circle", "triangle", "cross")
MOTIONS: tuple[str, ...] = ("standing still", "moving left", "moving right", "moving up", "moving down")
CAMERAS: tuple[str, ...] = ("static", "pans left", "pans right", "zooms in", "zooms out")

#: Everything below is in pixels of a 64-pixel frame and scales with `size`.
REFERENCE_SIZE = 64
DISPLACEMENT = 24.0
PAN = 24.0
ZOOM = 1.6
RADIUS = (10.5, 12.5)
OBJECT_JITTER = 2.5
STAGE_JITTER = 4.0
BRIGHT, DARK = 0.95, 0.06

_DIRECTION = {
    "standing still": (0.0, 0.0),
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
}
#: camera -> (pan in units of PAN, log zoom in units of log ZOOM)
_CAMERA = {
    "static": (0.0, 0.0),
    "pans left": (-1.0, 0.0),
    "pans right": (1.0, 0.0),
    "zooms in": (0.0, 1.0),
    "zooms out": (0.0, -1.0),
}
#: Pools of light: x, y, radius (pixels from the stage centre), brightness. Deliberately not periodic.
_LAMPS = (
    (-30.0, -14.0, 11.0, 0.22),
    (-21.0, 24.0, 10.0, -0.20),
    (0.0, -29.0, 10.0, -0.18),
    (8.0, 27.0, 10.0, 0.22),
    (26.0, -15.0, 10.0, 0.20),
    (33.0, 14.0, 11.0, -0.20),
    (-46.0, 6.0, 10.0, -0.16),
    (49.0, -4.0, 10.0, 0.16),
)
_STAGE = 128  # side of the square of stage that is ever visible, in reference pixels
_CAPTION = re.compile(r"^an? (?P<colour>\w+) (?P<shape>\w+) (?P<motion>[\w ]+), camera (?P<camera>[\w ]+)$")


@dataclass(frozen=True, slots=True)
class Scene:
    """One caption of the world, as its four attributes.

    Raises:
        ValueError: an attribute is not one of COLOURS, SHAPES, MOTIONS, CAMERAS.
    """

    colour: str
    shape: str
    motion: str = "standing still"
    camera: str = "static"

    def __post_init__(self) -> None:
        for name, allowed in ATTRIBUTES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Scene.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def caption(self) -> str:
        """For example ``a red circle moving left, camera pans right``."""
        return f"a {self.colour} {self.shape} {self.motion}, camera {self.camera}"

    @property
    def still_caption(self) -> str:
        """The part that one frame shows: ``a red circle``."""
        return f"a {self.colour} {self.shape}"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """Read a scene back from `caption` (or `still_caption`, with the other attributes at rest).

        Raises:
            ValueError: the text is not a caption of this world.
        """
        text = " ".join(caption.lower().split())
        match = _CAPTION.match(text) or _CAPTION.match(f"{text} standing still, camera static")
        if match is None:
            raise ValueError(f"{caption!r} is not like 'a red circle moving left, camera pans right'")
        return cls(**match.groupdict())


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "motion": MOTIONS,
    "camera": CAMERAS,
}


def _stable_order(scene: Scene) -> bytes:
    return hashlib.sha256(scene.caption.encode()).digest()


#: All 450 scenes in an order that looks random and never changes.
SCENES: tuple[Scene, ...] = tuple(
    sorted((Scene(*words) for words in itertools.product(*ATTRIBUTES.values())), key=_stable_order)
)
#: Captions a model may be trained on, and captions it only ever meets in a test.
TRAIN: tuple[Scene, ...] = SCENES[:250]
HELD_OUT: tuple[Scene, ...] = SCENES[250:]


@dataclass(frozen=True, slots=True)
class Truth:
    """What was drawn. `centre` [B, F, 2] (x, y) of the object in pixels, `mask` [B, F, H, W] its coverage
    in [0, 1], `pan` [B, F] the camera's x position on the stage in pixels, `zoom` [B, F] its magnification."""

    centre: Tensor
    mask: Tensor
    pan: Tensor
    zoom: Tensor


@dataclass(frozen=True, slots=True)
class _Draw:
    """The random numbers of a batch, drawn on the CPU so that every device renders the same clips."""

    radius: Tensor  # [B]
    object_shift: Tensor  # [B, 2]
    stage_shift: Tensor  # [B, 2]
    tint: Tensor  # [B, 3]
    base: Tensor  # [B]
    coarse: Tensor  # [B, 1, 8, 8]
    fine: Tensor  # [B, 1, 13, 13]


def _draw(batch: int, generator: torch.Generator | None, device: torch.device) -> _Draw:
    home = "cpu" if generator is None else generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        noise = torch.rand(batch, *shape, generator=generator, device=home)
        return (low + (high - low) * noise).to(device)

    return _Draw(
        radius=uniform(*RADIUS),
        object_shift=uniform(-OBJECT_JITTER, OBJECT_JITTER, 2),
        stage_shift=uniform(-STAGE_JITTER, STAGE_JITTER, 2),
        tint=uniform(-0.035, 0.035, 3),
        base=uniform(0.40, 0.48),
        coarse=uniform(-0.13, 0.13, 1, 8, 8),
        fine=uniform(-0.04, 0.04, 1, 13, 13),
    )


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) to a shape of about the area of a circle of `radius`,
    with its centroid at the origin and y pointing down. All tensors broadcast."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "triangle":
        inner = 0.68 * radius  # inradius; equilateral, apex up, so the circumradius is 2 * inner
        slant = math.sqrt(3.0) / 2.0
        return torch.maximum(y - inner, slant * x.abs() - 0.5 * y - inner)
    if shape == "cross":
        long, thin = 1.12 * radius, 0.37 * radius
        bar = torch.maximum(x.abs() - long, y.abs() - thin)
        post = torch.maximum(x.abs() - thin, y.abs() - long)
        return torch.minimum(bar, post)
    raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}")


def object_rgb(colour: str) -> tuple[float, float, float]:
    """RGB in [0, 1] of a colour word: pure hues, 60 degrees apart."""
    on = {
        "red": (1, 0, 0),
        "yellow": (1, 1, 0),
        "green": (0, 1, 0),
        "cyan": (0, 1, 1),
        "blue": (0, 0, 1),
        "magenta": (1, 0, 1),
    }[colour]
    r, g, b = (BRIGHT if channel else DARK for channel in on)
    return r, g, b


def _stage(draw: _Draw) -> Tensor:
    """Brightness of the stage, [B, 1, 128, 128], one texel per reference pixel."""
    axis = torch.arange(_STAGE, device=draw.base.device) + 0.5 - _STAGE / 2
    x = axis.view(1, 1, 1, -1) - draw.stage_shift[:, 0].view(-1, 1, 1, 1)
    y = axis.view(1, 1, -1, 1) - draw.stage_shift[:, 1].view(-1, 1, 1, 1)
    light = draw.base.view(-1, 1, 1, 1)
    for lamp_x, lamp_y, radius, power in _LAMPS:
        across = torch.exp(-((x - lamp_x) ** 2) / (2 * radius**2))
        light = light + power * across * torch.exp(-((y - lamp_y) ** 2) / (2 * radius**2))
    for octave in (draw.coarse, draw.fine):
        light = light + F.interpolate(octave, size=_STAGE, mode="bicubic", align_corners=True)
    return light


def _times(frames: int, device: torch.device) -> Tensor:
    """Times in [-1/2, 1/2]; a single frame is the middle of the clip."""
    if frames == 1:
        return torch.zeros(1, device=device)
    return torch.linspace(-0.5, 0.5, frames, device=device)


def _background(scenes: Sequence[Scene], draw: _Draw, t: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Film the stage: brightness [B, F, H, W], pan [B, F] and zoom [B, F] (reference pixels)."""
    moves = torch.tensor([_CAMERA[s.camera] for s in scenes], device=t.device)
    pan = moves[:, :1] * PAN * t
    zoom = torch.exp(moves[:, 1:] * math.log(ZOOM) * t)
    unit = REFERENCE_SIZE / size
    axis = (torch.arange(size, device=t.device) + 0.5) * unit - REFERENCE_SIZE / 2
    x = (axis.view(1, 1, 1, -1) / zoom[..., None, None] + pan[..., None, None]) * (2.0 / _STAGE)
    y = (axis.view(1, 1, -1, 1) / zoom[..., None, None]) * (2.0 / _STAGE)
    batch, frames = pan.shape
    shape = (batch, frames, size, size)
    grid = torch.stack((x.expand(shape), y.expand(shape)), dim=-1).view(batch, frames * size, size, 2)
    seen = F.grid_sample(_stage(draw), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return seen.view(batch, frames, size, size), pan, zoom


def _object(scenes: Sequence[Scene], draw: _Draw, t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Coverage of the object [B, F, H, W] and its centre [B, F, 2] in pixels of the frame."""
    scale = size / REFERENCE_SIZE
    direction = torch.tensor([_DIRECTION[s.motion] for s in scenes], device=t.device)
    path = direction[:, None] * (DISPLACEMENT * t).view(1, -1, 1) + draw.object_shift[:, None]
    centre = (path + REFERENCE_SIZE / 2) * scale
    axis = torch.arange(size, device=t.device) + 0.5
    mask = torch.empty(len(scenes), len(t), size, size, device=t.device)
    for shape in SHAPES:
        rows = [i for i, s in enumerate(scenes) if s.shape == shape]
        if rows:
            x = axis.view(1, 1, 1, -1) - centre[rows, :, 0, None, None]
            y = axis.view(1, 1, -1, 1) - centre[rows, :, 1, None, None]
            radius = (draw.radius[rows] * scale).view(-1, 1, 1, 1)
            mask[rows] = (0.5 - signed_distance(shape, x, y, radius)).clamp(0.0, 1.0)
    return mask, centre


@overload
def render(
    scenes: Sequence[Scene],
    *,
    frames: int = ...,
    size: int = ...,
    generator: torch.Generator | None = ...,
    device: str | torch.device = ...,
    return_truth: Literal[False] = ...,
) -> Tensor: ...
@overload
def render(
    scenes: Sequence[Scene],
    *,
    frames: int = ...,
    size: int = ...,
    generator: torch.Generator | None = ...,
    device: str | torch.device = ...,
    return_truth: Literal[True],
) -> tuple[Tensor, Truth]: ...
def render(
    scenes: Sequence[Scene],
    *,
    frames: int = 9,
    size: int = REFERENCE_SIZE,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
    return_truth: bool = False,
) -> Tensor | tuple[Tensor, Truth]:
    """Draw one clip per scene: float32 [B, F, 3, H, W] in [0, 1]; with `return_truth` also what was drawn.

    The camera and the object traverse their path over the clip whatever its number of frames. With a seeded
    CPU `generator` the result is the same clip on every device. Costs about 3 ms a clip on one CPU core.

    Raises:
        ValueError: no scenes, or a non-positive `frames` or `size`.
    """
    if not scenes or frames < 1 or size < 8:
        raise ValueError(f"render needs scenes, frames >= 1, size >= 8; got {len(scenes)}, {frames}, {size}")
    target = torch.device(device)
    draw, t = _draw(len(scenes), generator, target), _times(frames, target)
    light, pan, zoom = _background(scenes, draw, t, size)
    mask, centre = _object(scenes, draw, t, size)
    tint = draw.tint.view(-1, 1, 3, 1, 1)
    paint = torch.tensor([object_rgb(s.colour) for s in scenes], device=target).view(-1, 1, 3, 1, 1)
    ground = light.unsqueeze(2) + tint
    clip = torch.lerp(ground, paint.expand_as(ground), mask.unsqueeze(2)).clamp_(0.0, 1.0)
    if not return_truth:
        return clip
    return clip, Truth(centre=centre, mask=mask, pan=pan * size / REFERENCE_SIZE, zoom=zoom)


def sample_scenes(pool: Sequence[Scene], count: int, generator: torch.Generator | None = None) -> list[Scene]:
    """Draw `count` scenes from `pool` with replacement."""
    device = "cpu" if generator is None else generator.device
    picks = torch.randint(len(pool), (count,), generator=generator, device=device)
    return [pool[i] for i in picks.tolist()]
