"""The cheapest steps with which a call fits a memory budget, predicted before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config
from diffeff.core.method import Method
from diffeff.errors import ConfigError, MemoryBudgetError, MethodInapplicable, PlanConflict
from diffeff.methods.memory.budget import parse_bytes
from diffeff.methods.memory.estimate import Estimate, estimate_peak, weight_bytes
from diffeff.methods.memory.estimate_offload import follow
from diffeff.methods.memory.feature_slicing import FeatureSlicing
from diffeff.methods.memory.ladder import Rung, put_on, rungs

__all__ = ["MemoryGoal", "MemoryPlan", "Step", "plan_memory"]

log = logging.getLogger("diffeff")
_MOST = 32
"""Times as many operators as the call as asked takes, beyond which slices are too small to be worth a trace."""
Check = Callable[[Sequence[Method[Any]], tuple[DenoiserMap, ...]], None]


@dataclass(frozen=True, kw_only=True)
class MemoryGoal:
    """What `memory=` asks for: the most bytes a call may hold in all, weights included.

    `memory`: such as "8GB", or "auto": nine tenths of what is free on the device. On a CPU the budget is the process's
    resident set. `retries`: how often a call that runs out of memory all the same is run again one step further down.
    `allow_quantization`: whether weights may become int8. `allow_inexact`: whether the VAE may work in blended tiles.
    """

    memory: str | int = "auto"
    retries: int = 2
    allow_quantization: bool = False
    allow_inexact: bool = True

    def __post_init__(self) -> None:
        if self.memory != "auto":
            parse_bytes(self.memory)
        if self.retries < 0:
            raise ConfigError(f"memory retries is {self.retries}; allowed: 0 or more")

    @classmethod
    def of(cls, what: MemoryGoal | str | int) -> MemoryGoal:
        """A goal from what a user gives."""
        return what if isinstance(what, MemoryGoal) else cls(memory=what)

    def budget(self, free: int | None) -> int:
        """Bytes. `free`: what the device has left, weights that are there already counted as free."""
        if self.memory != "auto":
            return parse_bytes(self.memory)
        if free is None:
            raise ConfigError("memory is 'auto', but this system does not tell how much is free. Say how much: '8GB'")
        return int(0.9 * free)


@dataclass(frozen=True)
class Step:
    """One step of the ladder with what is predicted for it; `ratio`: its time over that of the call as asked."""

    rung: Rung
    estimate: Estimate | None
    ratio: float | None
    reason: str = ""
    """Why it was not considered; empty where it was."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        peak = None if self.estimate is None else self.estimate.peak
        ratio = None if self.ratio is None else round(self.ratio, 3)
        return self.rung.to_dict() | {"peak": peak, "time_ratio": ratio, "reason": self.reason}


@dataclass(frozen=True)
class MemoryPlan:
    """The ladder up to the first step that fits `budget`: `steps[-1]`, and `further` ones for a call that does not."""

    budget: int
    steps: tuple[Step, ...]
    further: tuple[Rung, ...] = ()

    @property
    def chosen(self) -> Step:
        """The step to take."""
        return self.steps[-1]

    @property
    def predicted(self) -> Estimate:
        """Bytes per stage with it."""
        if self.chosen.estimate is None:
            raise MemoryBudgetError("this step of the ladder was not estimated")
        return self.chosen.estimate

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = self.steps[0].estimate
        return {
            "budget": self.budget,
            "steps": [step.to_dict() for step in self.steps],
            "plain": None if plain is None else plain.to_dict(),
            "predicted": self.predicted.to_dict(),
        }


def plan_memory(
    pipeline: Any,
    denoisers: tuple[DenoiserMap, ...],
    asked: Sequence[Config],
    goal: MemoryGoal,
    call: Mapping[str, Any],
    *,
    check: Check | None = None,
    process: int = 0,
    free: int | None = None,
) -> MemoryPlan:
    """The cheapest ladder of steps with which `pipeline(**call)` under the plan `asked` fits `goal`.

    Every step is estimated, none is run. `check` refuses methods that do not go together (PlanConflict). `process`:
    bytes the process holds besides weights (CPU), `free`: bytes the device could give (memory="auto"). Raises
    MemoryBudgetError, with the least that was reached, the stage that binds and what would help, when no step fits.
    """
    budget = goal.budget(free)
    ladder = list(_ladder(pipeline, denoisers, asked, goal, budget - process))
    world = _World(pipeline, denoisers, call, check, process)
    steps: list[Step] = []
    for number, rung in enumerate(ladder):
        steps.append(world.consider(rung, steps))
        estimate = steps[-1].estimate
        if estimate is not None and estimate.peak <= budget:
            log.info("memory: %s, predicted peak %s bytes of %s", rung.name, f"{estimate.peak:,}", f"{budget:,}")
            return MemoryPlan(budget, tuple(steps), tuple(ladder[number + 1 :]))
    raise MemoryBudgetError(_refusal(pipeline, goal, budget, steps))


def _ladder(
    pipeline: Any, denoisers: tuple[DenoiserMap, ...], asked: Sequence[Config], goal: MemoryGoal, tensors: int
) -> Iterator[Rung]:
    device = pipeline._execution_device
    weights = sum(size for size, _ in weight_bytes(pipeline, device).values())
    tiling = goal.allow_inexact and callable(getattr(getattr(pipeline, "vae", None), "enable_tiling", None))
    return rungs(
        asked,
        tensors,
        weights,
        accelerator=device.type != "cpu",
        slicing=_sliceable(denoisers),
        tiling=tiling,
        quantization=goal.allow_quantization,
    )


def _sliceable(denoisers: tuple[DenoiserMap, ...]) -> bool:
    try:
        FeatureSlicing().build().bind(denoisers)
    except MethodInapplicable:
        return False
    return True


@dataclass(frozen=True)
class _World:
    """What all steps are tried on."""

    pipeline: Any
    denoisers: tuple[DenoiserMap, ...]
    call: Mapping[str, Any]
    check: Check | None
    process: int

    def consider(self, rung: Rung, before: Sequence[Step]) -> Step:
        """The prediction for one step. One that this model or plan refuses is passed over, with its reason."""
        known = [s.estimate for s in before if s.estimate is not None]
        if rung.tighter and before and before[-1].reason:
            return Step(rung, None, None, before[-1].reason)
        most = _MOST * sum(s.operators // max(s.calls, 1) for s in known[0].stages.values()) if known else None
        try:
            estimate = self._trace(rung, most) if rung.traced else follow(rung, known, self.denoisers)
        except (MethodInapplicable, PlanConflict) as error:
            if not before:
                raise
            return Step(rung, None, None, str(error))
        return Step(rung, estimate, estimate.seconds / known[0].seconds if known else 1.0)

    def _trace(self, rung: Rung, most: int | None) -> Estimate:
        methods = sorted((config.build() for config in rung.methods), key=lambda m: m.layer)
        for method in methods:
            method.bind(self.denoisers)
        if self.check is not None:
            self.check(methods, self.denoisers)
        undo = put_on(self.pipeline, rung.actions, self.pipeline._execution_device)
        try:
            return estimate_peak(self.pipeline, self.denoisers, self.call, methods, self.process, most)
        finally:
            undo()


def _refusal(pipeline: Any, goal: MemoryGoal, budget: int, steps: Sequence[Step]) -> str:
    found = [(s.estimate, s.rung.name) for s in steps if s.estimate is not None]
    least, name = min(found, key=lambda pair: pair[0].peak)
    stage = least.stages[least.binding]
    return (
        f"this call of {type(pipeline).__name__} does not fit {_size(budget)}: the least is {_size(least.peak)} "
        f"({name}; as asked {_size(found[0][0].peak)}). The stage that binds is {least.binding}: "
        f"{_size(stage.weights)} of weights, {_size(stage.activations)} of activations, "
        f"{_size(stage.snapshots)} of cache snapshots"
        f"{f', {_size(least.process)} of the process itself' if least.process else ''}. What would help: "
        f"{'; '.join(_advice(goal, budget, least))}."
    )


def _advice(goal: MemoryGoal, budget: int, least: Estimate) -> Iterator[str]:
    stage = least.stages[least.binding]
    if stage.weights + least.process < budget:
        yield "fewer frames, a smaller size or batch"
    if stage.snapshots > stage.total // 10:
        yield "a cache that keeps fewer snapshots"
    yield "dtype=torch.bfloat16 where the weights are float32"
    if not goal.allow_quantization:
        yield "allow_quantization=True (int8 weights)"
    if least.device == "cpu":
        yield f"a budget of {_size(least.peak)} or more"
    else:
        yield "another device"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
