"""The arguments a pipeline's call needs before its memory can be estimated, where only a size was asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffeff.errors import ConfigError

__all__ = ["sized_call"]

_SIDE = 512


def sized_call(
    pipeline: Any,
    given: Mapping[str, Any],
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """`given` with the sizes, and a prompt, class, blank image or video where the pipeline asks for one.

    Sizes in pixels. Raises ConfigError for a size the pipeline has no argument for.
    """
    takes = inspect.signature(type(pipeline).__call__).parameters
    call = {name: value for name, value in given.items() if name in takes}
    count = "num_frames" if "num_frames" in takes else "video_length"
    for option, name, value in (("height", "height", height), ("width", "width", width), ("frames", count, frames)):
        if value is not None and name not in takes:
            raise ConfigError(f"{type(pipeline).__name__} takes no {option}; leave it out")
        call |= {} if value is None else {name: value}
    return _subject(takes, call, batch) | call


def _subject(takes: Mapping[str, Any], call: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """What the call is about: any prompt will do, because prompts are padded to one length."""
    subject: dict[str, Any] = {}
    if "class_labels" in takes:
        subject["class_labels"] = [0] * batch
    if "prompt" in takes and "prompt_embeds" not in call:
        subject["prompt"] = ["a"] * batch
    for name in ("image", "control_image", "mask_image"):
        if _required(takes, name) or (name == "image" and name in takes and "prompt" not in takes):
            subject[name] = _blank(call)
    if _required(takes, "video"):
        subject["video"] = [_blank(call)] * int(call.get("num_frames", 16))
    return subject


def _required(takes: Mapping[str, Any], name: str) -> bool:
    """Whether the pipeline cannot do without: diffusers gives such inputs no default, or None for the first one."""
    if name not in takes:
        return False
    first = next(key for key in takes if key != "self") == name
    return first or takes[name].default is inspect.Parameter.empty or _image_led(takes, name)


def _image_led(takes: Mapping[str, Any], name: str) -> bool:
    names = list(takes)
    return "prompt" in takes and 0 <= names.index(name) - names.index("prompt") <= 2 and name != "mask_image"


def _blank(call: Mapping[str, Any]) -> Any:
    from PIL import Image

    return Image.new("RGB", (int(call.get("width") or _SIDE), int(call.get("height") or _SIDE)))
