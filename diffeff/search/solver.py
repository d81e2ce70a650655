"""Fitting a solver: the timesteps and weights with which a few denoiser calls end where the plain run ends.

A solver of K evaluations moves the latents by weighted sums of all it has computed (see FittedSolver). Least squares on
one recorded plain run give the first weights. Gauss-Newton (Levenberg-Marquardt) then adjusts weights and timesteps
together on what counts, the final latents: the solver is run, its derivatives are taken by finite differences, and
evaluations before the changed value are taken from memory. The model's own weights are never touched, and no gradient
of the model is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.sampling.fitted_solver import DELTAS, FittedSolver, FittedSolverMethod, deltas_known
from diffeff.search.trace import Job, Trace, attached, record

__all__ = ["Fit", "first_guess", "fit"]

log = logging.getLogger("diffeff")

_WEIGHT_STEP, _TIME_STEP = 1e-3, 1.0
_RIDGE = 1e-6
_DAMPINGS = (1e-6, 1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Fit:
    """A fitted solver and how near it comes.

    `errors` are root mean square differences of the final latents to the plain run's, over their standard deviation:
    of the first guess, then after every round. `calls` counts denoiser calls (rows of one branch) that fitting took.
    """

    config: FittedSolver
    errors: tuple[float, ...]
    calls: int

    @property
    def cost(self) -> int:
        """Denoiser calls of one run, both branches counted."""
        return self.config.calls + len(self.config.guided)


@dataclass
class _Memory:
    """Predictions of the base run by (evaluation, branch). Those before `valid` stand in for calls."""

    kept: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    valid: int = 0
    calls: int = 0


class _Probed(FittedSolverMethod):
    """The solver, computing only what a change of one value affects."""

    def __init__(self, config: FittedSolver, memory: _Memory) -> None:
        super().__init__(config)
        self.memory = memory

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        memory, k = self.memory, run.clock.index

        def remembered(asked: StepCall) -> Tensor:
            key = k, asked.branch
            if k < memory.valid:
                return memory.kept[key]
            memory.calls += asked.rows
            found = proceed(asked)
            if memory.valid == 0:
                memory.kept[key] = found.detach().clone()
            return found

        return super().around_step(run, call, remembered)


def fit(
    pipe: Any,
    job: Job,
    evaluations: int,
    guided: Sequence[int] | None = None,
    *,
    rounds: int = 4,
    trace: Trace | None = None,
    observe: Callable[[float, str], None] = lambda done, what: None,
) -> Fit:
    """Fit a solver of `evaluations` calls to what `job` gives on a DiffEffPipeline without a plan.

    `guided` are the evaluations that compute the unconditional branch too (all, unless given). `trace` is a recorded
    plain run of the job, made when missing. `observe` hears of the progress (0 to 1). Four prompts are enough for
    the two dozen values of a typical solver.

    Raises ConfigError for impossible numbers, MethodInapplicable for schedulers whose latents a sum cannot follow
    (noise is added at every step, or inputs are scaled by the step).
    """
    _refuse_scheduler(pipe.scheduler)
    plain = record(pipe, job) if trace is None else trace
    config = first_guess(plain, evaluations, tuple(range(evaluations)) if guided is None else tuple(guided))
    if plain.final is None:
        raise ConfigError("the recorded run has no final latents")
    fitting = _Fitting(pipe, job, plain.final, config)
    for number in range(rounds):
        if not fitting.improve(_Part(observe, number, rounds)):
            break
    return Fit(fitting.config, tuple(fitting.errors), fitting.memory.calls)


@dataclass(frozen=True)
class _Part:
    """Progress of one round, as progress of the whole."""

    observe: Callable[[float, str], None]
    number: int
    rounds: int

    def __call__(self, done: float) -> None:
        self.observe((self.number + done) / self.rounds, f"round {self.number + 1}")


def _refuse_scheduler(scheduler: Any) -> None:
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    stochastic = "Ancestral" in name or "SDE" in name or "sde" in str(config.get("algorithm_type", ""))
    if stochastic or config.get("stochastic_sampling", False):
        raise MethodInapplicable(
            f"{name} adds noise at every step: no sum of predictions can follow it. Use an ODE one."
        )
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise MethodInapplicable(
            f"{name} scales the denoiser's input by the step; a solver with timesteps of its own cannot use it. Choose "
            "a scheduler whose latents go in as they are (UniPC, DPM-Solver++, DDIM)."
        )


# --- the first guess -------------------------------------------------------------------------------------------------
def first_guess(trace: Trace, evaluations: int, guided: tuple[int, ...]) -> FittedSolver:
    """Evaluations spread evenly over the recorded steps; weights by least squares along the plain run.

    Raises ConfigError for fewer than 1 or more than the recorded steps, and for a run without guidance to estimate.
    """
    if not 1 <= evaluations <= trace.steps:
        raise ConfigError(f"evaluations is {evaluations}; allowed: 1 to the plain run's {trace.steps} steps")
    if not trace.guided:
        guided = tuple(range(evaluations))
    elif 0 not in guided:
        raise ConfigError("guided must hold evaluation 0: there is no earlier guidance difference to estimate from")
    at = [round(k * trace.steps / evaluations) for k in range(evaluations)]
    updates = [w for k in range(evaluations) for w in _update_weights(trace, at, k)]
    deltas = [w for k in range(evaluations) if k not in guided for w in _delta_weights(trace, at, guided, k)]
    times = tuple(trace.timesteps[i] for i in at)
    return FittedSolver(timesteps=times, guided=guided, updates=tuple(updates), deltas=tuple(deltas))


def _update_weights(trace: Trace, at: Sequence[int], k: int) -> list[float]:
    target = trace.latents[at[k + 1]] if k + 1 < len(at) else trace.final
    if target is None:
        raise ConfigError("the recorded run has no final latents")
    return _least_squares([trace.latents[at[k]], *(trace.predictions[i] for i in at[: k + 1])], target)


def _delta_weights(trace: Trace, at: Sequence[int], guided: Sequence[int], k: int) -> list[float]:
    known = [g for g in sorted(guided) if g < k][-DELTAS:]
    if len(known) != deltas_known(guided, k):
        raise RuntimeError("the known guidance differences were counted wrongly")
    differences = trace.differences
    return _least_squares([*(differences[at[g]] for g in known), trace.cond[at[k]]], differences[at[k]])


def _least_squares(features: Sequence[Tensor], target: Tensor) -> list[float]:
    """Ridge regression, the ridge relative to the features' size: neighbouring predictions are nearly parallel."""
    x = torch.stack([f.detach().double().flatten() for f in features], dim=1)
    gram = x.T @ x
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(features), dtype=gram.dtype)
    weights: list[float] = torch.linalg.solve(gram, x.T @ target.detach().double().flatten()).tolist()
    return weights


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Value:
    """One number of a solver: the field it stands in, its place there, and how many evaluations it leaves alone."""

    field: str
    place: int
    valid: int
    step: float


def _values(config: FittedSolver) -> list[_Value]:
    """All numbers that are fitted: weights, differences' weights, and every timestep but the first."""
    found: list[_Value] = []
    for k in range(config.calls):
        found += [_Value("updates", len(found) + i, k + 1, _WEIGHT_STEP) for i in range(k + 2)]
    place = 0
    for k in config.estimated:
        for _ in config.delta(k):
            found.append(_Value("deltas", place, k + 1, _WEIGHT_STEP))
            place += 1
    return found + [_Value("timesteps", k, k, _TIME_STEP) for k in range(1, config.calls)]


def _moved(config: FittedSolver, values: Sequence[_Value], change: Sequence[float]) -> FittedSolver:
    """The solver with `change` added to its values. Raises ConfigError where timesteps would no longer fall."""
    data = {name: list(getattr(config, name)) for name in ("timesteps", "updates", "deltas")}
    for value, delta in zip(values, change, strict=True):
        data[value.field][value.place] += delta
    if data["timesteps"][-1] <= 0:
        raise ConfigError("a timestep fell below 0")
    return FittedSolver(guided=config.guided, **{name: tuple(column) for name, column in data.items()})


class _Fitting:
    """The state of one fit."""

    def __init__(self, pipe: Any, job: Job, target: Tensor, config: FittedSolver) -> None:
        self.pipe, self.job, self.config = pipe, job, config
        self.target = target.double().flatten()
        self.scale = float(self.target.std())
        self.memory = _Memory()
        self.residual = self._run(config, valid=0)
        self.errors = [self._error(self.residual)]

    def _run(self, config: FittedSolver, valid: int) -> Tensor:
        """Final latents less the plain run's, flat, in float64."""
        self.memory.valid = valid
        with attached(self.pipe, _Probed(config, self.memory), self.job.beside) as run:
            return run(self.job).double().flatten() - self.target

    def _error(self, residual: Tensor) -> float:
        return float(residual.square().mean().sqrt()) / self.scale

    def improve(self, observe: Callable[[float], None]) -> bool:
        """One round: derivatives by finite differences, then the first damped step that helps."""
        values = _values(self.config)
        columns = []
        for number, value in enumerate(values):
            shift = [value.step if v is value else 0.0 for v in values]
            moved = _moved(self.config, values, shift)
            columns.append((self._run(moved, value.valid) - self.residual) / value.step)
            observe((number + 1) / (len(values) + 1))
        jacobian = torch.stack(columns, dim=1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ self.residual
        kept = self.memory.kept
        for damping in _DAMPINGS:
            step = torch.linalg.solve(normal + damping * torch.diag(normal.diagonal()), slope)
            if self._accept(values, (-step).tolist()):
                return self.errors[-1] < 0.98 * self.errors[-2]
        self.memory.kept = kept
        return False

    def _accept(self, values: Sequence[_Value], change: Sequence[float]) -> bool:
        """Take the changed solver if it ends nearer to the plain run."""
        before, self.memory.kept = self.memory.kept, {}
        try:
            moved = _moved(self.config, values, change)
            residual = self._run(moved, valid=0)
        except ConfigError:
            self.memory.kept = before
            return False
        error = self._error(residual)
        if not math.isfinite(error) or error >= self.errors[-1]:
            self.memory.kept = before
            return False
        self.config, self.residual = moved, residual
        self.errors.append(error)
        log.debug("fitted solver: error %.4f", error)
        return True
