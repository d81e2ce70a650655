"""What of the latents is signal: a Wiener filter that follows the noise level of the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffeff.core.run import Clock, Run, StepCall
from diffeff.errors import ConfigError

__all__ = ["SignalView", "is_flow", "signal_and_noise", "wiener"]

_FRAMES_FIRST = ("cogvideox",)
_PROPORTIONAL = 0.05


def signal_and_noise(clock: Clock) -> tuple[float, float]:
    """The factors of data and noise in the latents the denoiser is given at this step.

    Flow matching: 1 - sigma and sigma. Else sigma is the ratio of noise to data, and latents have unit variance (or
    are scaled to it before the call). Raises ConfigError where the scheduler has no noise level.
    """
    sigma = clock.sigma
    if sigma != sigma:
        raise ConfigError(
            "the scheduler tells no noise levels (sigmas or alphas_cumprod), which the spectral filter of seacache "
            "needs. Use another scheduler, or easycache, which needs none."
        )
    if is_flow(clock):
        return 1 - sigma, sigma
    size = (1 + sigma**2) ** 0.5
    return 1 / size, sigma / size


def is_flow(clock: Clock) -> bool:
    """Whether the schedule is one of flow matching, whose models predict velocities.

    It counts time from 0 to 1 as its noise level, and its timesteps are that level times a constant.
    """
    if clock.sigmas is None or clock.timesteps is None:
        return False
    sigmas = clock.sigmas[: clock.total]
    large = sigmas > _PROPORTIONAL
    if float(sigmas.max()) > 1 + 1e-6 or not bool(large.any()):
        return False
    scale = clock.timesteps[: clock.total][large] / sigmas[large]
    return float((scale.max() - scale.min()) / scale.mean().abs().clamp_min(1e-9)) < _PROPORTIONAL


def wiener(x: Tensor, axes: tuple[int, ...], signal: float, noise: float, power: float) -> Tensor:
    """`x` through the filter that estimates data with a spectrum |f|^-power from signal * data + noise * white noise.

    Separable over `axes`, its response scaled to unit mean so that outputs of different steps compare. float32.
    """
    wide = x.float()
    spectrum, gain = torch.fft.fftn(wide, dim=axes), torch.ones((), device=x.device)
    for axis in axes:
        frequency = torch.fft.fftfreq(wide.shape[axis], device=x.device).abs()
        clean = 1.0 / (frequency.pow(power) + 1e-16)
        response = signal * clean / (signal**2 * clean + noise**2 + 1e-16)
        gain = gain * response.reshape([-1 if a == axis else 1 for a in range(wide.ndim)])
    found: Tensor = torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=axes).real
    return found


@dataclass(frozen=True)
class SignalView:
    """Shows the indicator the latents of a denoiser call through the filter at the step's noise level."""

    power: float

    def __call__(self, run: Run, x: Tensor) -> Tensor:
        if run.call is None:
            raise RuntimeError("the spectral filter was asked for outside a denoiser call")
        signal, noise = (min(max(v, 1e-6), 1 - 1e-6) for v in signal_and_noise(run.clock))
        grid, axes = _unpacked(run.call, x)
        return wiener(grid, axes, signal, noise, self.power)


def _unpacked(call: StepCall, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Latents with their space (and time) as dimensions, and which these are."""
    if x.ndim == 4:
        return x, (2, 3)
    if x.ndim == 5:
        frames = 1 if _frames_first(call, x) else 2
        return x, (frames, 3, 4)
    sites = call.denoiser.attentions
    found = call.denoiser.grid(sites[0], x.shape[1], call.arguments) if sites and x.ndim == 3 else None
    if found is None or found.image_tokens != x.shape[1]:
        return x, (1,)
    grid = x.unflatten(1, (found.frames, found.height, found.width))
    return grid, (1, 2, 3) if found.frames > 1 else (2, 3)


def _frames_first(call: StepCall, x: Tensor) -> bool:
    """Whether dimension 1 counts frames and dimension 2 channels."""
    channels = getattr(getattr(call.denoiser.module, "config", None), "in_channels", None)
    if (x.shape[1] == channels) != (x.shape[2] == channels):
        return bool(x.shape[2] == channels)
    return call.denoiser.family in _FRAMES_FIRST
