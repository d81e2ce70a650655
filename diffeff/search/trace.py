"""What a plain run did, step by step: the material of every search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffeff.core.config import Config
from diffeff.core.method import Layer, Method
from diffeff.core.run import Run, StepCall
from diffeff.core.session import Session
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.predictor import time_axis

__all__ = ["Job", "Trace", "attached", "record"]


@dataclass(frozen=True)
class Job:
    """The calls a search is about: prompts with their seeds, and everything else the pipeline is called with.

    All prompts go through the pipeline as one batch, each with a generator of its own, so that every row is what a
    single call with that seed would give (to rounding).
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, Any]
    """Keyword arguments of the pipeline: num_inference_steps, guidance_scale, height, ..."""
    beside: tuple[Config, ...] = ()
    """Exact methods that are on in every run of the search, to make it shorter."""

    def run(self, pipe: Any, **more: Any) -> Tensor:
        """The final latents [prompts, ...]."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        options = {"output_type": "latent", "return_dict": False} | dict(self.call) | more
        found: Tensor = pipe(prompt=list(self.prompts), generator=generators, **options)[0]
        return found


@dataclass
class Trace:
    """One plain run. Lists are by step: latents before it, guided prediction, and each branch's own prediction."""

    timesteps: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """The run's own time at each step: the noise level where the scheduler has one (see `time_axis`)."""
    latents: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    cond: list[Tensor] = field(default_factory=list)
    uncond: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.latents)

    @property
    def guided(self) -> bool:
        """Whether both branches of guidance were computed."""
        return len(self.uncond) == len(self.latents)

    @property
    def differences(self) -> list[Tensor]:
        """Guidance differences, cond less uncond, by step."""
        return [c.float() - u.float() for c, u in zip(self.cond, self.uncond, strict=True)]

    def note(self, run: Run, call: StepCall, prediction: Tensor) -> None:
        """A denoiser call gave `prediction`."""
        rows = run.guidance_rows(call) if call.branch == "both" else None
        if rows is not None:
            uncond, cond = (prediction.index_select(0, r.to(prediction.device)) for r in rows)
            self.cond.append(cond.detach().clone())
            self.uncond.append(uncond.detach().clone())
        elif call.branch in ("cond", "uncond"):
            getattr(self, call.branch).append(prediction.detach().clone())

    def note_update(self, run: Run, prediction: Tensor, latents: Tensor) -> None:
        """The scheduler is about to move `latents` by the guided `prediction`."""
        self.timesteps.append(run.clock.timestep)
        self.times.append(time_axis(run.clock)[run.clock.index])
        self.latents.append(latents.detach().clone())
        self.predictions.append(prediction.detach().clone())


@dataclass(frozen=True, kw_only=True)
class Recorder(Config):
    """Changes nothing, remembers everything."""

    name: ClassVar[str] = "recorder"
    summary: ClassVar[str] = "Records a plain run for a search."

    def build(self) -> _Recording:
        return _Recording(self)


class _Recording(Method[Recorder]):
    layer: ClassVar[Layer] = Layer.CONTROL

    def __init__(self, config: Recorder) -> None:
        super().__init__(config)
        self.trace = Trace()

    def begin(self, run: Run) -> None:
        self.trace = Trace()

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        prediction = proceed(call)
        self.trace.note(run, call, prediction)
        return prediction

    def around_update(
        self, run: Run, prediction: Tensor, latents: Tensor, proceed: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        self.trace.note_update(run, prediction, latents)
        return proceed(prediction, latents)


@contextmanager
def attached(pipe: Any, method: Method[Any], beside: Sequence[Config] = ()) -> Iterator[Callable[[Job], Tensor]]:
    """`method` on a DiffEffPipeline, whose own plan must be off, and the methods of `beside`: yields what runs a job
    and gives its latents."""
    session = Session(pipe.wrapped, pipe.denoisers, [method, *(config.build() for config in beside)])
    for one in session.methods:
        one.bind(session.denoisers)
    session.attach()

    def run(job: Job) -> Tensor:
        with session.managed_run(), torch.no_grad():
            return job.run(pipe.wrapped)

    try:
        yield run
    finally:
        session.detach()


def record(pipe: Any, job: Job) -> Trace:
    """Run `job` plainly on a DiffEffPipeline without a plan, and remember it.

    Raises MethodInapplicable where the final latents are not what the scheduler moved (pipelines that change them).
    """
    recording = _Recording(Recorder())
    with attached(pipe, recording, job.beside) as run:
        final = run(job)
    trace = recording.trace
    if trace.latents[-1].shape != final.shape:
        raise MethodInapplicable(
            f"the pipeline's latents end as {tuple(final.shape)}, but its scheduler moved "
            f"{tuple(trace.latents[-1].shape)}: nothing can be fitted to them"
        )
    trace.final = final.detach().clone()
    return trace
