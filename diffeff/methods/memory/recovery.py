"""Keeping a pipeline's calls within a memory budget: plan each kind of call, and step down when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffeff.core.run import Run
from diffeff.errors import DiffEffError
from diffeff.methods.memory.ladder import Rung
from diffeff.methods.memory.planner import MemoryGoal, MemoryPlan

__all__ = ["Host", "MemoryKeeper", "out_of_memory", "stage_of"]

log = logging.getLogger("diffeff")
_SIGNS = ("can't allocate memory", "not enough memory: you tried to allocate", "out of memory")
_NO_SIZE = ("num_inference_steps", "generator", "callback", "callback_on_step_end", "return_dict")


class Host(Protocol):
    """What the keeper needs of the pipeline it keeps."""

    def _planned(self, goal: MemoryGoal, call: Mapping[str, Any]) -> MemoryPlan: ...

    def _adopt(self, rung: Rung) -> None: ...

    def _run(self, call: Mapping[str, Any]) -> Any: ...

    def _last_run(self) -> Run | None: ...


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on CUDA, MPS or the CPU; also when it was raised from such a one."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return said or (isinstance(error, DiffEffError) and out_of_memory(error.__cause__))


def stage_of(run: Run | None) -> str:
    """The stage in which a run ended early."""
    if run is None or run.first_call is None:
        return "text"
    return "decode" if run.clock.total and run.clock.updates >= run.clock.length else "denoise"


class MemoryKeeper:
    """Plans once per kind of call (sizes, batch, guidance), and runs a call that runs out of memory again, one step
    further down the ladder each time, from the same random state; afterwards the planned step is back.
    """

    def __init__(self, goal: MemoryGoal) -> None:
        self.goal = goal
        self.plan: MemoryPlan | None = None
        self._kind: Any = None

    def call(self, host: Host, call: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """The call's result, and what the report should say. Raises MemoryBudgetError before anything runs when the
        call cannot fit, and the error of the last try when memory runs out beyond the retries."""
        plan = self._prepare(host, call)
        further = list(plan.further[: self.goal.retries])
        notes: list[str] = []
        random = _RandomState.of(call)
        try:
            while True:
                again, result = self._try(host, call, further, notes)
                if not again:
                    return result, notes
                random.restore()
        finally:
            if notes:
                host._adopt(plan.chosen.rung)

    def _try(self, host: Host, call: Mapping[str, Any], further: list[Rung], notes: list[str]) -> tuple[bool, Any]:
        try:
            return False, host._run(call)
        except BaseException as error:
            if not out_of_memory(error) or not further:
                raise
            stage = stage_of(host._last_run())
        _release()
        rung = further.pop(0)
        notes.append(f"out of memory in the stage {stage}: run again with {rung.name}, which was taken off afterwards")
        log.warning(notes[-1])
        host._adopt(rung)
        return True, None

    def _prepare(self, host: Host, call: Mapping[str, Any]) -> MemoryPlan:
        kind = _kind_of({k: v for k, v in call.items() if k not in _NO_SIZE})
        if self.plan is None or kind != self._kind:
            self.plan, self._kind = host._planned(self.goal, call), kind
            host._adopt(self.plan.chosen.rung)
        return self.plan


@dataclass(frozen=True)
class _RandomState:
    """The random state a call starts from: its generators' and torch's own."""

    generators: tuple[tuple[torch.Generator, Tensor], ...]
    own: Tensor

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> _RandomState:
        given = call.get("generator")
        found = given if isinstance(given, list | tuple) else [given]
        kept = tuple((g, g.get_state()) for g in found if isinstance(g, torch.Generator))
        return cls(kept, torch.get_rng_state())

    def restore(self) -> None:
        for generator, state in self.generators:
            generator.set_state(state)
        torch.set_rng_state(self.own)


def _release() -> None:
    """Give back what the failed try left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _kind_of(value: Any) -> Any:
    """What of an argument decides the size of the work."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((k, _kind_of(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_kind_of(v) for v in value)
    if isinstance(value, float):
        return value > 1
    return value if isinstance(value, int | None) else (type(value).__name__, getattr(value, "size", None))
