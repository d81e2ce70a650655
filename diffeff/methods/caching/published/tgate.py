"""T-GATE: after a gate step, cross attention is frozen and guidance is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, ModuleSite
from diffeff.core.config import knob
from diffeff.core.method import Claim, Layer, Outputs
from diffeff.core.run import Clock, Run, StepCall
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.module_cache import ModuleCache, ModuleLedger, Modules
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import present_parts
from diffeff.methods.guidance.guidance_skip import GuidanceLedger, GuidanceSkip, GuidanceSkipMethod

__all__ = ["TGate"]


@dataclass(frozen=True, kw_only=True)
class TGate(CacheConfig):
    """More than half of the later steps' work under guidance: one branch, and no cross attention, from the gate on.

    Up to the share `gate` of the run all is computed (self attention from the `warm_up`-th step on only at every
    `early_interval`-th). At the gate step, the mean of the conditional and the unconditional cross-attention output is
    kept; it stands in for cross attention at all later steps, where only the conditional branch is computed and is the
    prediction. Self attention is then computed at every `late_interval`-th step.

    Defaults: the gate is the paper's 10 of 25 steps, the intervals and the warm-up are those of its code (5, 1 and 2);
    the phase of the interval at which self attention is computed there was not checked.

    Differs: in nothing known. The frozen mean carries some of the guidance on; what is lost is the rest of it, and all
    of a negative prompt's effect on details.

    For models with cross attention (SD, SDXL, SVD, AnimateDiff, PixArt, Wan). Holds one output per cross attention, one
    per self attention and branch before the gate.

    Source: T-GATE (arXiv 2404.02747).
    """

    name: ClassVar[str] = "tgate"
    summary: ClassVar[str] = "After a gate step, cross attention is frozen and the unconditional branch is left out."

    gate: float = knob(0.4, "share of the run after which it acts; 1 only reuses self attention", low=0.05, high=1.0)
    warm_up: int = knob(2, "first steps in which self attention is always computed", low=1, step=1)
    early_interval: int = knob(5, "compute self attention every n-th step before the gate", low=1, high=16, step=1)
    late_interval: int = knob(1, "compute self attention every n-th step after the gate", low=1, high=16, step=1)

    def gate_of(self, clock: Clock) -> int:
        """The gate's entry of the timestep list; the last one if it lies beyond."""
        return clock.first + min(round(self.gate * clock.length), clock.length - 1)

    def _rule(self, site: ModuleSite, clock: Clock) -> Policy:
        gate, begin = self.gate_of(clock), clock.first + self.warm_up
        early = {i for i in range(clock.first, gate) if i < begin or (i - begin) % self.early_interval == 0}
        late = {i for i in range(gate, clock.total) if (i - gate) % self.late_interval == 0}
        return AtEntries(frozenset(early | late))

    def recipe(self) -> Recipe:
        alone = self.early_interval == self.late_interval == 1
        return Recipe(Modules(("cross",) if alone else ("cross", "self"), rule=self._rule), Interval(1))

    def build(self) -> TGateMethod:
        return TGateMethod(self)


@dataclass
class _Frozen:
    """The mean of one cross attention's outputs at the gate step, as its sum over branches."""

    total: Tensor | None = None
    branches: list[str] = field(default_factory=list)

    def add(self, branch: str, x: Tensor) -> None:
        if branch not in self.branches:
            self.total = x.float() if self.total is None else self.total + x.float()
            self.branches.append(branch)

    def mean(self, like: Tensor) -> Tensor | None:
        return None if self.total is None else (self.total / len(self.branches)).to(like.dtype)


class _GatedGuidance(GuidanceSkipMethod):
    """No unconditional branch after the gate."""

    def __init__(self, options: TGate) -> None:
        super().__init__(GuidanceSkip(reuse="none"))
        self.options = options

    def _computes(self, clock: Clock, ledger: GuidanceLedger) -> bool:
        return clock.index <= self.options.gate_of(clock)


class TGateMethod(ModuleCache):
    """Cross and self attention at the module site, and guidance around the step."""

    config: TGate
    layer: ClassVar[Layer] = Layer.GUIDANCE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_MODULE, Claim.SKIP_BRANCH})

    def __init__(self, config: TGate) -> None:
        recipe = config.recipe()
        super().__init__(config, recipe, recipe.site)  # type: ignore[arg-type]
        self.options, self.guidance = config, _GatedGuidance(config)

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        super().bind(denoisers)
        for denoiser in denoisers:
            if not any(site.kind == "cross" for site in denoiser.modules):
                raise MethodInapplicable(
                    f"tgate: {denoiser.name} ({denoiser.family}) has no cross attention to freeze. Use pab or "
                    "guidance_skip there."
                )

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {**super().claimed(denoiser), Claim.SKIP_BRANCH: frozenset({"*"})}

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        return self.guidance.around_step(run, call, proceed)

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        if site.kind != "cross":
            return super().around_module(run, site, hidden, proceed)
        if run.call is None:
            raise RuntimeError("tgate: a module was reached outside a denoiser call")
        name, at, gate = f"{run.call.denoiser.name}.{site.name}", self._moment(run), self.options.gate_of(run.clock)
        frozen = run.state(self, _Frozen, site=f"frozen {name}", branch="")
        parts, rows = present_parts(run)
        mean = frozen.mean(hidden) if at.index > gate else None
        ledger = run.state(self, lambda: ModuleLedger(kind="cross"), site=name, branch="")
        self._count(ledger.statistics, parts, [] if mean is not None else parts, at)
        if mean is not None:
            return (mean.repeat(len(parts), *(1,) * (mean.ndim - 1)),)
        outputs = proceed()
        if at.index == gate and outputs[0] is not None:
            for part in parts:
                frozen.add(part.branch, part.of(outputs[0], rows))
        return outputs

    def engaged(self, run: Run) -> tuple[bool, str]:
        attention, guidance = super().engaged(run), self.guidance.engaged(run)
        return attention[0] or guidance[0], f"attention: {attention[1]}; guidance: {guidance[1]}"

    def details(self, run: Run) -> Mapping[str, Any]:
        return {**super().details(run), "guidance": dict(self.guidance.details(run))}
