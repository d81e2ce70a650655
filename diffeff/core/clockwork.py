"""Reading the clock off a scheduler: which entry of its timestep list the run is at, and that entry's noise level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffeff.core.run import Clock

__all__ = ["advance", "seek", "wind"]


def wind(clock: Clock, scheduler: Any) -> None:
    """Start the clock on the timesteps the scheduler has just been given."""
    timesteps = torch.as_tensor(scheduler.timesteps).detach().to("cpu", torch.float64).flatten()
    clock.timesteps, clock.total = timesteps, len(timesteps)
    clock.sigmas = _sigmas(scheduler, timesteps)
    clock.index = clock.first = clock.updates = 0


def seek(clock: Clock, scheduler: Any, timestep: Any) -> None:
    """Before the first update: find where the run begins (img2img starts late).

    The scheduler's begin index says so where the pipeline set it; otherwise the timestep the denoiser is called with
    does, where it is one of the scheduler's own (some models take it rescaled).
    """
    if clock.updates or clock.timesteps is None:
        return
    begin = getattr(scheduler, "begin_index", None)
    found = int(begin) if begin is not None else _find(clock.timesteps, _scalar(timestep), 0)
    clock.first = clock.index = found if found is not None and found < clock.total else 0


def advance(clock: Clock, timestep: Any) -> int:
    """At an update of the latents at `timestep`: moves to the next entry and returns the one just left.

    A second update at the entry just left (pipelines with two latents) does not advance.
    """
    value, at = _scalar(timestep), clock.index
    if value is not None and clock.timesteps is not None:
        repeated = clock.updates > 0 and at > 0 and float(clock.timesteps[at - 1]) == value
        here = at < clock.total and float(clock.timesteps[at]) == value
        if repeated and not here:
            return at - 1
        if not here:
            found = _find(clock.timesteps, value, at)
            at = at if found is None else found
    if not clock.updates:
        clock.first = at
    clock.updates += 1
    clock.index = at + 1
    return at


def _scalar(timestep: Any) -> float | None:
    if timestep is None:
        return None
    flat = torch.as_tensor(timestep).detach().flatten()
    return float(flat[0].to(torch.float64)) if flat.numel() else None


def _find(timesteps: Tensor, value: float | None, start: int) -> int | None:
    if value is None:
        return None
    hits = (timesteps[start:] == value).nonzero()
    return start + int(hits[0]) if len(hits) else None


def _sigmas(scheduler: Any, timesteps: Tensor) -> Tensor | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return torch.as_tensor(sigmas).detach().to("cpu", torch.float64).flatten()
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    at = alphas.to("cpu", torch.float64)[timesteps.long().clamp(0, len(alphas) - 1)]
    noise: Tensor = ((1 - at) / at.clamp_min(1e-12)).sqrt()
    return noise
