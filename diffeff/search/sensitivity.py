"""How much the end of a run moves per unit of error in the prediction of one step: finite differences on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffeff.core.method import Layer, Method
from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError
from diffeff.search.trace import Job, Recorder, Trace, attached

__all__ = ["Replayed", "first_order", "sensitivities"]

Floats = NDArray[np.float64]


class Replayed(Method[Recorder]):
    """Takes the steps before `until` from a recorded run instead of computing them, and adds `nudge` at `until`."""

    layer = Layer.CONTROL

    def __init__(self, trace: Trace, until: int, nudge: Tensor | None = None) -> None:
        super().__init__(Recorder())
        self.trace, self.until, self.nudge = trace, until, nudge

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        if run.clock.index >= self.until:
            return proceed(call)
        found = recorded_output(self.trace, run, call)
        return proceed(call) if found is None else found

    def around_update(
        self, run: Run, prediction: Tensor, latents: Tensor, proceed: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        k = run.clock.index
        if k < self.until:
            prediction = self.trace.predictions[k].clone()
        elif k == self.until and self.nudge is not None:
            prediction = prediction + self.nudge.to(prediction)
        return proceed(prediction, latents)


def recorded_output(trace: Trace, run: Run, call: StepCall) -> Tensor | None:
    """What the denoiser gave at the present step of the recorded run, where it was recorded for all of the call."""
    k = run.clock.index
    complete = {"cond": len(trace.cond) == trace.steps, "uncond": len(trace.uncond) == trace.steps}
    if complete.get(call.branch, False):
        return getattr(trace, call.branch)[k].clone()  # type: ignore[no-any-return]
    rows = run.guidance_rows(call) if call.branch == "both" else None
    if rows is None or not all(complete.values()):
        return None
    halves = [trace.uncond[k], trace.cond[k]]
    return torch.cat(halves if int(rows[0][0]) == 0 else halves[::-1])


def first_order(times: Sequence[float]) -> Floats:
    """What a sampler of first order would do with an error, had the model no say: the length of the step in noise
    level, relative to the whole run's. A guess to begin with, without any call."""
    ends = np.array([*times, 0.0 if times[-1] < times[0] else 2 * times[-1] - times[-2 if len(times) > 1 else -1]])
    lengths = np.abs(np.diff(ends))
    return np.asarray(lengths / lengths.sum(), dtype=np.float64)


def sensitivities(
    pipe: Any,
    job: Job,
    trace: Trace,
    points: int = 6,
    *,
    observe: Callable[[float], None] = lambda done: None,
) -> Floats:
    """Relative change of the final latents per unit of relative error in the guided prediction, for every step, [T].

    `points` steps are nudged by what holding the previous prediction would get wrong, and the rest of the run is
    computed anew: about `points / 2` plain runs of `job`, which must be what `trace` recorded. Steps between take the
    ratio to `first_order`, interpolated. Raises ConfigError for a trace without its end.
    """
    if trace.final is None:
        raise ConfigError("the recorded run has no final latents")
    guess, steps = first_order(trace.times), trace.steps
    nudged = sorted({max(1, round(k)) for k in np.linspace(1, steps - 1, min(points, steps - 1))})
    ratios = []
    for number, k in enumerate(nudged):
        nudge = trace.predictions[k - 1].float() - trace.predictions[k].float()
        with attached(pipe, Replayed(trace, k, nudge), job.beside) as run:
            moved = _length(run(job) - trace.final)
        ratios.append(moved / (guess[k] * _length(nudge)))
        observe((number + 1) / len(nudged))
    found = guess * np.exp(np.interp(np.arange(steps), nudged, np.log(np.maximum(ratios, 1e-12))))
    return np.asarray(found, dtype=np.float64)


def _length(x: Tensor) -> float:
    return float(x.detach().double().square().sum().sqrt())
