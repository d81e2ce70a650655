"""Pixels made ready for a network: checked, resized and scaled the same way on both sides of a comparison.

Every preparation can say what it does (`describe`), because a Frechet distance moves by whole points when the resize
changes (Parmar et al. 2022, "On Aliased Resizing").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffeff.errors import ConfigError, ModelLoadError

__all__ = [
    "ClipPreparation",
    "check_frames",
    "check_rows",
    "device_of",
    "exactly",
    "in_batches",
    "reason",
    "resize_like_tensorflow1",
]

BATCH = 16
"""Images a network sees at once on an accelerator."""


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ConfigError when this machine has none such, before anything is loaded on it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise ConfigError(
            f"features cannot run on device {str(name)!r}: {reason(error)}. Use 'cpu' or 'cuda'."
        ) from error
    return device


def reason(error: Exception) -> str:
    """The first line of what another library says went wrong; its advice and stack stay in the chained error."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def check_frames(frames: Tensor, spec: str) -> Tensor:
    """The frames, if they are uint8 [N, 3, H, W]; else ConfigError.

    Floats are refused rather than guessed at: [0, 1] read as [0, 255] gives plausible and wrong numbers.
    """
    if frames.dtype != torch.uint8:
        raise ConfigError(
            f"features of {spec!r} need uint8 frames in 0..255, got {frames.dtype}. Scale and round first."
        )
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape[2:]:
        raise ConfigError(f"features of {spec!r} need frames [N, 3, H, W], got {list(frames.shape)}")
    return frames


def check_rows(rows: Tensor, count: int, dim: int, spec: str) -> Tensor:
    """The features as float32 on the CPU, if there is one finite row of `dim` numbers per image; else ConfigError."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(f"features of {spec!r} must be a floating point tensor, got {kind}")
    if tuple(rows.shape) != (count, dim):
        raise ConfigError(f"features of {spec!r} must be [{count}, {dim}], got {list(rows.shape)}")
    if not rows.isfinite().all():
        raise ConfigError(f"features of {spec!r} contain NaN or infinity: the weights or the function are broken")
    return rows.detach().to("cpu", torch.float32)


@contextmanager
def exactly() -> Iterator[None]:
    """Inside, networks run without gradients and in full float32 on every device, the same way each time."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def in_batches(
    items: Tensor | Sequence[str], function: Callable[[Any], Tensor], *, dim: int, device: torch.device, spec: str
) -> Tensor:
    """`function` over frames or texts, a few at a time, as float32 [N, dim] on the CPU.

    On the CPU they go one by one: the last bits of a convolution depend on the batch size, and a resumed run meets
    other batches. That costs about a tenth of the time there; an accelerator gets BATCH at once.
    """
    size = 1 if device.type == "cpu" else BATCH
    rows = torch.empty(len(items), dim)
    for start in range(0, len(items), size):
        part = items[start : start + size]
        with exactly():
            rows[start : start + size] = check_rows(function(part), len(part), dim, spec)
    return rows


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it: no half-pixel offset, no antialiasing. [N, C, H, W] to [N, C, size, size].

    Published FID numbers were made with it (Heusel et al. 2017), so ours are too.
    """
    return _lerp(_lerp(images, size, dim=3), size, dim=2)


def _lerp(images: Tensor, size: int, dim: int) -> Tensor:
    length = images.shape[dim]
    # float32 whatever the images are: TensorFlow computes positions in it
    position = torch.arange(size, device=images.device) * torch.tensor(length / size, device=images.device)
    low = position.long()
    high = (low + 1).clamp_max(length - 1)
    weight = (position - low).to(images.dtype).view([-1 if axis == dim else 1 for axis in range(4)])
    start = images.index_select(dim, low)
    return start + (images.index_select(dim, high) - start) * weight


@dataclass(frozen=True, kw_only=True)
class ClipPreparation:
    """What CLIP was trained to see: the short side (or both) resized by Pillow, the centre cut out, scaled.

    `size` is the short side in pixels, or (height, width); `crop` (height, width); `mean` and `std` are of values in
    [0, 1]. The same pixels as transformers' Pillow image processor, without its dependence on torchvision.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int]
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> ClipPreparation:
        """Read a `preprocessor_config.json`. Raises ModelLoadError for steps that CLIP does not have."""
        skipped = [step for step in _STEPS if config.get(step, True) is not True]
        if skipped:
            raise ModelLoadError(f"{where} switches {', '.join(skipped)} off; only CLIP's own preparation is supported")
        try:
            made = cls(
                size=_resize_target(config.get("size", 224)),
                crop=_pair(config.get("crop_size", 224)),
                resample=_known_resample(config.get("resample", 3)),
                mean=_three(config.get("image_mean", _MEAN)),
                std=_three(config.get("image_std", _STD)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{where} does not describe a CLIP preparation: {error!r}") from error
        if min(made.crop) < 1 or max(made.crop) > made.smallest():
            raise ModelLoadError(f"{where}: a crop of {made.crop} does not fit into a resize to {made.size}")
        return made

    def smallest(self) -> int:
        """The shortest side an image can have after the resize."""
        return self.size if isinstance(self.size, int) else min(self.size)

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, 3, crop height, crop width], on the frames' device."""
        from PIL import Image

        pictures = [Image.fromarray(row) for row in frames.permute(0, 2, 3, 1).cpu().numpy()]
        pixels = torch.from_numpy(np.stack([self._cut(picture) for picture in pictures])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).to(frames.device)

    def _cut(self, picture: Any) -> Any:
        from PIL import Image

        height, width = self._resized(picture.height, picture.width)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling(self.resample)))
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return pixels[top : top + self.crop[0], left : left + self.crop[1]]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        short, long = min(height, width), max(height, width)
        longer = int(self.size * long / short)
        return (longer, self.size) if height > width else (self.size, longer)

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        from PIL import Image

        kind = Image.Resampling(self.resample).name.lower()
        side = "short side" if isinstance(self.size, int) else "both sides, aspect not kept"
        return {
            "size": self.size if isinstance(self.size, int) else list(self.size),
            "resize": f"{kind}, antialiased (Pillow), {side}",
            "crop": f"centre {self.crop[0]}x{self.crop[1]}",
            "mean": list(self.mean),
            "std": list(self.std),
        }


_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size), int(size))


def _resize_target(size: Any) -> int | tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["shortest_edge"]) if "shortest_edge" in size else _pair(size)
    return int(size)


def _known_resample(value: Any) -> int:
    from PIL import Image

    return int(Image.Resampling(value))


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
