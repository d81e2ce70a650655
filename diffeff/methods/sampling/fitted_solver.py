"""FittedSolver: a sampler of few denoiser calls, whose timesteps and weights were fitted to the plain run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method, Undo
from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.predictor import accumulate
from diffeff.methods.guidance.branches import Rows, conditional_alone, halves

__all__ = ["FittedSolver", "FittedSolverMethod", "deltas_known"]

_LATE = (
    "fitted_solver was fitted to runs from pure noise; image-to-image and video-to-video runs begin later (strength). "
    "Use feature_cache there."
)
DELTAS = 2
"""How many earlier guidance differences an estimated one may draw on."""


def deltas_known(guided: Sequence[int], step: int) -> int:
    """How many computed guidance differences are at hand before evaluation `step`."""
    return min(DELTAS, sum(g < step for g in guided))


@dataclass(frozen=True, kw_only=True)
class FittedSolver(Config):
    """A whole run in a handful of denoiser calls: timesteps and update weights fitted to what the plain run does.

    The latents after evaluation k are `a_k x + sum_j c_kj m_j` over the latents x before it and the guided predictions
    m of all evaluations so far, the form of every multistep solver. The unconditional branch is computed at the
    evaluations in `guided`; at the others the guidance difference is a fitted sum of the last two known ones and the
    present conditional prediction.

    The values come from `diffeff.search.solver.fit` (a few prompts, no training of the model) and hold for one model,
    scheduler, guidance scale and number of plain steps; a plan's stamp warns where model or scheduler differ, not where
    the guidance scale does. Needs a run from pure noise (no image-to-image strength). Holds one latent per evaluation.

    Related: Bespoke solvers (arXiv 2310.19075), DPM-Solver-v3 (2310.13268), S4S (2502.17423).
    """

    name: ClassVar[str] = "fitted_solver"
    summary: ClassVar[str] = "The fewest denoiser calls: timesteps and update weights are fitted to the plain run."

    timesteps: tuple[float, ...] = knob((), "timesteps of the evaluations, falling")
    guided: tuple[int, ...] = knob((), "evaluations that also compute the unconditional branch")
    updates: tuple[float, ...] = knob((), "per evaluation k: weight of the latents, then of predictions 0 to k")
    deltas: tuple[float, ...] = knob((), "per evaluation outside guided: weights of known differences and cond")

    def check(self) -> None:
        if any(b >= a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ConfigError(f"fitted_solver.timesteps must fall from one to the next, got {self.timesteps}")
        self._length("updates", sum(k + 2 for k in range(self.calls)))
        self._length("deltas", sum(deltas_known(self.guided, k) + 1 for k in self.estimated))
        if any(not 0 <= g < self.calls for g in self.guided):
            raise ConfigError(f"fitted_solver.guided {self.guided} names evaluations outside 0..{self.calls - 1}")

    def _length(self, name: str, wanted: int) -> None:
        found = len(getattr(self, name))
        if found != wanted:
            raise ConfigError(
                f"fitted_solver.{name} has {found} values, but {self.calls} timesteps with guided={self.guided} need "
                f"{wanted}"
            )

    @property
    def calls(self) -> int:
        """Evaluations of the conditional branch."""
        return len(self.timesteps)

    @property
    def estimated(self) -> tuple[int, ...]:
        """Evaluations whose guidance difference is estimated."""
        return tuple(k for k in range(self.calls) if k not in self.guided)

    def update(self, k: int) -> tuple[float, ...]:
        """Weights after evaluation k: of the latents, then of predictions 0 to k."""
        start = sum(j + 2 for j in range(k))
        return self.updates[start : start + k + 2]

    def delta(self, k: int) -> tuple[float, ...]:
        """Weights of the estimated difference at evaluation k: of the known ones, oldest first, then of cond."""
        before = [deltas_known(self.guided, j) + 1 for j in self.estimated if j < k]
        start = sum(before)
        return self.deltas[start : start + deltas_known(self.guided, k) + 1]

    def build(self) -> FittedSolverMethod:
        return FittedSolverMethod(self)


@dataclass
class _Ledger:
    """What one run remembers: guided predictions, guidance differences by evaluation, the present cond."""

    predictions: list[Tensor] = field(default_factory=list)
    differences: dict[int, Tensor] = field(default_factory=dict)
    cond: tuple[int, Tensor] | None = None
    left_out: int = 0


class FittedSolverMethod(Method[FittedSolver]):
    """Takes the scheduler's place: sets its timesteps, moves the latents, and estimates the unconditional branch."""

    layer: ClassVar[Layer] = Layer.SCHEDULE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.TIMESTEPS, Claim.SKIP_STEP, Claim.SKIP_BRANCH})

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if not self.config.timesteps:
            raise MethodInapplicable(
                "fitted_solver has no timesteps: it has to be fitted to your model first. diffeff.search.solver.fit "
                "does that from a few prompts."
            )
        if len(denoisers) > 1:
            names = ", ".join(d.name for d in denoisers)
            raise MethodInapplicable(
                f"fitted_solver: a pipeline with several denoisers ({names}) switches between them by its own "
                "timesteps. Use feature_cache there."
            )

    def rewrite_pipeline(self, pipeline: Any) -> Undo | None:
        if "strength" in inspect.signature(type(pipeline).__call__).parameters:
            raise MethodInapplicable(_LATE)
        return None

    def inspect(self, denoiser: DenoiserMap) -> str:
        return f"{self.config.calls} calls of {denoiser.name}, {len(self.config.guided)} of them with both branches"

    def _ledger(self, run: Run) -> _Ledger:
        return run.state(self, _Ledger, site="solver", branch="")

    def around_schedule(self, run: Run, timesteps: Tensor, proceed: Callable[[Tensor], Tensor]) -> Tensor:
        return proceed(torch.tensor(self.config.timesteps, dtype=torch.float32, device=timesteps.device))

    def begin(self, run: Run) -> None:
        if run.clock.first:
            raise MethodInapplicable(_LATE)

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        ledger, k = self._ledger(run), run.clock.index
        rows = run.guidance_rows(call) if call.branch == "both" else None
        if rows is not None:
            return self._batched(ledger, k, call, rows, proceed)
        if call.branch == "uncond":
            return self._uncond(ledger, k, call, proceed)
        prediction = proceed(call)
        ledger.cond = k, prediction.detach()
        return prediction

    def _uncond(self, ledger: _Ledger, k: int, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        """The unconditional call of an evaluation; the conditional one has come before it."""
        cond = ledger.cond[1] if ledger.cond is not None and ledger.cond[0] == k else None
        if cond is None:
            raise ConfigError("fitted_solver: this pipeline calls the unconditional branch first; fit with guided=all")
        if k in self.config.guided:
            uncond = proceed(call)
            ledger.differences[k] = cond.float() - uncond.float()
            return uncond
        return self._estimate(ledger, k, cond)

    def _batched(
        self,
        ledger: _Ledger,
        k: int,
        call: StepCall,
        rows: Rows,
        proceed: Callable[[StepCall], Tensor],
    ) -> Tensor:
        """A call with both branches; `rows` are the unconditional and the conditional ones."""
        if k in self.config.guided:
            both = proceed(call)
            uncond, cond = halves(both, rows)
            ledger.differences[k] = cond.float() - uncond.float()
            return both
        return conditional_alone(call, rows, proceed, lambda cond: self._estimate(ledger, k, cond))

    def _estimate(self, ledger: _Ledger, k: int, cond: Tensor) -> Tensor:
        """The unconditional prediction that stands in: cond less the estimated difference."""
        ledger.left_out += 1
        known = [ledger.differences[j] for j in sorted(ledger.differences)[-DELTAS:]]
        difference = accumulate([*known, cond], self.config.delta(k))
        return (cond.float() - difference).to(cond.dtype)

    def around_update(
        self, run: Run, prediction: Tensor, latents: Tensor, proceed: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        ledger, k = self._ledger(run), len(self._ledger(run).predictions)
        ledger.predictions.append(prediction.detach())
        return accumulate([latents, *ledger.predictions], self.config.update(k)).to(latents.dtype)

    def engaged(self, run: Run) -> tuple[bool, str]:
        found = [s for s in run.states(self).values() if isinstance(s, _Ledger)]
        if not found:
            return False, "the scheduler's step was never reached"
        calls = len(found[0].predictions)
        return True, f"the run took {calls} steps of its own, {found[0].left_out} of them without the other branch"

    def details(self, run: Run) -> Mapping[str, Any]:
        found = [s for s in run.states(self).values() if isinstance(s, _Ledger)]
        held = [t for s in found for t in (*s.predictions, *s.differences.values())]
        return {
            "timesteps": list(self.config.timesteps),
            "guided": list(self.config.guided),
            "bytes_held": sum(t.numel() * t.element_size() for t in held),
        }
