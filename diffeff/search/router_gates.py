"""What a router's training does inside the denoiser: count, gate softly with gradients, gate hard, replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffeff.anatomy.types import DenoiserMap, ModuleSite
from diffeff.core.config import Config
from diffeff.core.method import Layer, Method, Outputs
from diffeff.core.run import Run, StepCall
from diffeff.methods.caching.predictor import time_axis

__all__ = ["Denoising", "Gated", "Kept", "Play", "RouterSeam", "Survey"]

Kept = dict[str, Outputs]
"""What each module put out when it was last computed, by denoiser, module and branch."""
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Play(Protocol):
    """What happens at a denoiser call, and at a module inside it."""

    def step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        """The prediction that the pipeline goes on with."""

    def module(self, run: Run, site: ModuleSite, proceed: Callable[[], Outputs]) -> Outputs:
        """The module's outputs."""


@dataclass(frozen=True, kw_only=True)
class Router(Config):
    """Stands for the router while it is trained."""

    name: ClassVar[str] = "router"
    summary: ClassVar[str] = "Trains a router."


class RouterSeam(Method[Router]):
    """Lets a `Play` act at all modules of the denoisers; notes the latents that the run ends with."""

    layer: ClassVar[Layer] = Layer.MODULE

    def __init__(self, play: Play) -> None:
        super().__init__(Router())
        self.play = play
        self.final: Tensor | None = None

    def module_sites(self, denoiser: DenoiserMap) -> tuple[ModuleSite, ...]:
        return denoiser.modules

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        return self.play.step(run, call, proceed)

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        return self.play.module(run, site, proceed)

    def around_update(
        self, run: Run, prediction: Tensor, latents: Tensor, proceed: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        result = proceed(prediction, latents)
        self.final = (result if isinstance(result, Tensor) else result[0]).detach()
        return result


def _key(run: Run, site: ModuleSite) -> str:
    if run.call is None:
        raise RuntimeError("router: a module was reached outside a denoiser call")
    return f"{run.call.denoiser.name}.{site.name} {run.call.branch}"


def _detached(outputs: Outputs) -> Outputs:
    return tuple(None if x is None else x.detach() for x in outputs)


# --- survey -------------------------------------------------------------------------------------------------------
@dataclass
class Survey:
    """One plain run: the time of each entry, and the arithmetic of every module and of the whole denoiser call."""

    times: tuple[float, ...] = ()
    first: int = 0
    modules: dict[str, dict[str, float]] = field(default_factory=dict)
    """Floating-point operations of each module in one call, by denoiser."""
    calls: dict[str, float] = field(default_factory=dict)
    """The same of the whole call."""
    used: dict[int, str] = field(default_factory=dict)
    """The denoiser of each entry."""
    _counting: bool = False

    def step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        self.times, self.first = time_axis(run.clock), run.clock.first
        name = call.denoiser.name
        self.used[run.clock.index] = name
        self._counting = name not in self.calls
        if not self._counting:
            return proceed(call)
        self.modules[name] = {}
        with _counter() as counter:
            prediction = proceed(call)
        self.calls[name] = float(counter.get_total_flops())
        return prediction

    def module(self, run: Run, site: ModuleSite, proceed: Callable[[], Outputs]) -> Outputs:
        if not self._counting or run.call is None:
            return proceed()
        with _counter() as counter:
            outputs = proceed()
        counts = self.modules[run.call.denoiser.name]
        counts[site.name] = counts.get(site.name, 0.0) + counter.get_total_flops()
        return outputs


def _counter() -> FlopCounterMode:
    """Counts floating-point operations, those of attention on a CPU too, which torch leaves out."""
    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention})


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


# --- step-wise denoising training -----------------------------------------------------------------------------------
@dataclass
class Denoising:
    """One trajectory of step-wise denoising training: gradients of the error of every step reach `logits`.

    `logits` [entries, modules], `weights` [entries]. At each call but those that have nothing to repeat, the denoiser
    runs twice from the same latents: with everything computed, and with every output mixed as p fresh + (1 - p) kept,
    p = sigmoid(logit). The second prediction is what the run goes on with, so that later steps see what the router does
    to earlier ones; weight times the mean squared difference goes backward at once. What is kept is detached, and
    replaced by the fresh output where p exceeds 1/2: no graph crosses a step, and memory is that of one call.

    What is kept also serves later steps, which the gradient of a step's own error does not see. `carried` [entries,
    modules] adds it up: the derivative of later steps' errors by p, had the output been kept in that measure. At a
    later step it is the inner product of the error's gradient by what is kept with what keeping the fresh output would
    have changed; it reaches back to the last replacement, and at most `reach` steps.
    """

    logits: Tensor
    columns: dict[str, int]
    weights: Tensor
    errors: dict[int, float] = field(default_factory=dict)
    """Mean squared error of each entry, its calls added up."""
    kept: Kept = field(default_factory=dict)
    reach: int = 4
    carried: Tensor = field(init=False)
    _changes: dict[str, deque[tuple[int, Outputs]]] = field(default_factory=dict)
    """By module and branch: entries since the last replacement, and fresh less kept at each."""
    _used: dict[str, tuple[int, Outputs, Outputs]] = field(default_factory=dict)
    """By module and branch: column, what was kept (leaves of the present graph), and fresh less kept."""
    _mixing: Tensor | None = None
    _filling: bool = False

    def __post_init__(self) -> None:
        self.carried = torch.zeros_like(self.logits, requires_grad=False)

    def step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        index = run.clock.index
        if index == run.clock.first:
            self._filling = True
            return proceed(call)
        self._filling = False
        target = proceed(call).detach()
        with torch.enable_grad():
            self._mixing = self.logits[index].sigmoid()
            try:
                found = proceed(call)
            finally:
                self._mixing = None
            error = F.mse_loss(found.float(), target.float())
            if error.requires_grad:
                (self.weights[index] * error).backward()
        self._carry(index)
        self.errors[index] = self.errors.get(index, 0.0) + float(error.detach())
        return found.detach()

    def module(self, run: Run, site: ModuleSite, proceed: Callable[[], Outputs]) -> Outputs:
        fresh = proceed()
        if self._mixing is None and not self._filling:
            return fresh
        key = _key(run, site)
        old = self.kept.get(key)
        if self._mixing is None or old is None:
            self.kept[key] = _detached(fresh)
            return fresh
        column = self.columns[site.name]
        p = self._mixing[column]
        leaves = tuple(None if x is None else x.detach().requires_grad_() for x in old)
        change = tuple(None if x is None or y is None else (x - y).detach() for x, y in zip(fresh, old, strict=True))
        self._used[key] = column, leaves, change
        if float(p.detach()) > 0.5:
            self.kept[key] = _detached(fresh)
        return tuple(None if x is None or y is None else _mix(p, x, y) for x, y in zip(fresh, leaves, strict=True))

    def _carry(self, index: int) -> None:
        """After a call went backward: what earlier rows would have changed, and this row's own change kept."""
        for key, (column, leaves, change) in self._used.items():
            past = self._changes.setdefault(key, deque(maxlen=self.reach))
            for row, earlier in past:
                self.carried[row, column] += sum(
                    float((x.grad * y).sum())
                    for x, y in zip(leaves, earlier, strict=True)
                    if x is not None and y is not None and x.grad is not None
                )
            if float(self.logits[index, column].detach()) > 0:
                past.clear()
            past.append((index, change))
        self._used.clear()


def _mix(p: Tensor, fresh: Tensor, old: Tensor) -> Tensor:
    return old + p.to(fresh.device, fresh.dtype) * (fresh - old)


# --- one step gated -------------------------------------------------------------------------------------------------
@dataclass
class Gated:
    """A run in which the table holds up to entry `last` and everything after it is computed.

    What the denoiser said before `last` is taken from `said` (the run before this one, with a smaller `last`, was the
    same up to there), so that a series of such runs costs each only its own end. `plain` is what it said at the entry
    after `last`, with all computed.
    """

    table: list[list[bool]]
    columns: dict[str, int]
    last: int
    said: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    _index: int = -1

    def step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        self._index = index = run.clock.index
        key = (index, call.branch)
        if index < self.last and key in self.said:
            return self.said[key]
        prediction = proceed(call)
        if index <= self.last:
            self.said[key] = prediction.detach()
        elif index == self.last + 1:
            self.plain[call.branch] = prediction.detach()
        return prediction

    def module(self, run: Run, site: ModuleSite, proceed: Callable[[], Outputs]) -> Outputs:
        if self._index > self.last:
            return proceed()
        key = _key(run, site)
        old = self.kept.get(key)
        if old is not None and not self.table[self._index][self.columns[site.name]]:
            return old
        fresh = proceed()
        self.kept[key] = _detached(fresh)
        return fresh
