"""The table of tiny pipelines, and making, calling and running one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffeff.errors import ConfigError, UnknownName, nearest
from diffeff.zoo.tiny.request import Request, Tiny
from diffeff.zoo.tiny.transformers import TRANSFORMERS
from diffeff.zoo.tiny.unets import UNETS
from diffeff.zoo.tiny.wan import WAN

__all__ = ["FAMILIES", "call_kwargs", "make", "run", "tiny"]

FAMILIES: dict[str, Tiny] = {**WAN, **TRANSFORMERS, **UNETS}


def tiny(name: str) -> Tiny:
    """The line of the table. Raises UnknownName, naming the nearest."""
    if name not in FAMILIES:
        raise UnknownName(f"there is no tiny pipeline {name!r}. {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def make(name: str, seed: int = 0) -> Any:
    """The tiny pipeline `name`, with weights drawn from `seed`; the global random state is left alone."""
    row = tiny(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = row.build()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _wake(component)
                component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(
    name: str,
    pipe: Any,
    *,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Arguments for `pipe(**kwargs)`, with a fresh generator.

    `size`: (height, width) or (frames, height, width) of the latents; `more` overrides, and `...` leaves out.
    Raises ConfigError for more rows than the pipeline takes, or another size where it has only one.
    """
    row = tiny(name)
    if batch > row.max_batch or (size is not None and not row.resizable):
        raise ConfigError(f"tiny {name} takes at most {row.max_batch} rows; resizable: {row.resizable}")
    frames, height, width = row.size if size is None else (*row.size[: 3 - len(size)], *size)
    request = Request(pipe, steps, seed, batch, (frames, height, width), guidance)
    common = {
        "num_inference_steps": steps,
        "guidance_scale": row.scale if guidance else 1.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    kwargs = {**common, **row.call(request), **more}
    return {key: value for key, value in kwargs.items() if value is not ...}


def run(name: str, pipe: Any, **options: Any) -> Tensor:
    """The pipeline's output (latents, or pixels where it cannot return latents) as one tensor; `options` as for
    `call_kwargs`."""
    with torch.no_grad():
        found = pipe(**call_kwargs(name, pipe, **options), return_dict=False)
    output = found[0] if isinstance(found, tuple) else found
    return output if isinstance(output, Tensor) else torch.as_tensor(np.asarray(output))


def _wake(module: nn.Module) -> None:
    """Give weights that the library starts at zero (ControlNet's outputs) values, so that they take part."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
