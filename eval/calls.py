"""The call of a diffusers pipeline: which arguments it takes for a prompt, and the clips it gives back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.append_log import digest
from diffeff.eval.settings import CallSettings
from diffeff.zoo import bundled

__all__ = ["clips_of", "fingerprint", "options_of", "parameters", "subject_of"]


def clips_of(output: Any) -> list[NDArray[np.float32]]:
    """The clips of a pipeline's output (`output_type="np"`), float32 `[frames, height, width, 3]` each."""
    found = output.frames if hasattr(output, "frames") else output.images
    clips = [np.asarray(clip, dtype=np.float32) for clip in found]
    return [clip if clip.ndim == 4 else clip[None] for clip in clips]


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def options_of(model: str, call: CallSettings, pipe: Any) -> dict[str, Any]:
    """Arguments of the call: what was asked for, over the model's card, over the pipeline's own steps."""
    takes = parameters(pipe)
    options = {"num_inference_steps": takes["num_inference_steps"].default}
    card = bundled.recommended(model).call_options() if model in bundled.NAMES else {}
    options |= {name: value for name, value in card.items() if name in takes}
    return options | _asked(call, pipe, takes) | {"output_type": "np"}


def _asked(call: CallSettings, pipe: Any, takes: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "frames": "num_frames" if "num_frames" in takes else "video_length",
        "negative": "negative_prompt",
        "width": "width",
        "height": "height",
    }
    given = {option: value for option, value in vars(call).items() if value is not None}
    for option in given:
        if names[option] not in takes:
            raise ConfigError(f"{type(pipe).__name__} takes no {option}; leave it out")
    return {names[option]: value for option, value in given.items()}


def subject_of(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """The prompts, or for a class-conditional model the classes they name."""
    if "class_labels" not in parameters(pipe):
        return {"prompt": prompts if len(prompts) > 1 else prompts[0]}
    return {"class_labels": [_class_id(pipe, prompt) for prompt in prompts]}


def _class_id(pipe: Any, label: str) -> int:
    names: dict[str, int] = getattr(pipe, "labels", None) or {}
    if label in names:
        return names[label]
    count = int(pipe.transformer.config.num_embeds_ada_norm)
    if label.isdecimal() and int(label) < count:
        return int(label)
    raise ConfigError(f"there is no class {label!r}; known: {', '.join(names) or f'0 to {count - 1}'}")


def fingerprint(pipe: Any) -> str:
    """A digest of the shape and the first values of every weight of every component, encoders and decoder included."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    facts = {
        f"{name}.{key}": _sample(tensor)
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    return digest(facts, 16)


def _sample(tensor: torch.Tensor) -> list[Any]:
    shape = [str(tensor.dtype), list(tensor.shape)]
    if tensor.device.type == "meta":
        return shape
    try:
        return [*shape, tensor.detach().flatten()[:8].float().tolist()]
    except (RuntimeError, NotImplementedError, TypeError):  # quantised tensors of some packages cannot be cut
        return shape
