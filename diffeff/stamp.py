"""The fingerprint of a pipeline: what a plan was made on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from diffeff.anatomy.types import DenoiserMap
from diffeff.plan import ModelStamp

__all__ = ["stamp_of"]

_TENSORS, _VALUES = 16, 256


def stamp_of(pipe: Any, denoisers: tuple[DenoiserMap, ...]) -> ModelStamp:
    """Family, fingerprint and scheduler of a pipeline without a plan on it.

    The fingerprint is the first 16 hex digits of a sha256 over each denoiser's class, config, parameter names and
    shapes, and a sample of its weights rounded to bfloat16, so that the same model loaded in another precision of at
    least that many bits keeps it.
    """
    digest = hashlib.sha256()
    for denoiser in denoisers:
        digest.update(type(denoiser.module).__name__.encode())
        config = {k: v for k, v in dict(getattr(denoiser.module, "config", {})).items() if not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        _weights(digest, denoiser.module)
    return ModelStamp(denoisers[0].family, digest.hexdigest()[:16], type(pipe.scheduler).__name__)


def _weights(digest: Any, module: torch.nn.Module) -> None:
    named = sorted(module.named_parameters(), key=lambda item: item[0])
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
    for _, tensor in named[:: max(len(named) // _TENSORS, 1)]:
        if tensor.device.type != "meta":
            sample = tensor.detach().flatten()[:_VALUES].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
