"""GuidanceSkip: leave out the unconditional branch of classifier-free guidance at some steps, or reuse an older one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method
from diffeff.core.run import Clock, Run, StepCall
from diffeff.errors import ConfigError
from diffeff.methods.guidance.branches import Rows, conditional_alone, halves

__all__ = ["GuidanceLedger", "GuidanceSkip", "GuidanceSkipMethod", "estimate", "scale_bands", "similarity"]


@dataclass(frozen=True, kw_only=True)
class GuidanceSkip(Config):
    """Up to half of the denoiser's work under guidance: the unconditional branch is skipped at some steps.

    `policy="interval"`: computed every `interval`-th step, estimated between (CFG cache of FasterCache,
    arXiv 2410.19355). `policy="window"`: guidance only from `start` to `stop`, the conditional prediction alone outside
    (limited interval, arXiv 2404.07724; Step-AG, arXiv 2506.08351); `first` and `last` play no part in it.
    `policy="adaptive"`: once the cosine of both predictions exceeds `threshold` in every row of the batch, the branch
    is dropped for all later steps but the protected last ones (Adaptive Guidance, arXiv 2312.12487).

    `reuse` fills in where the branch is left out: `"delta"` is eps_c + scale * (eps_u - eps_c) of the last step that
    had both, `"bands"` the same with factors `scale` for the coarse and `fine_scale` for the fine half of that
    difference (two Fourier bands of each frame, as FasterCache cuts them), `"hold"` the last eps_u, `"none"` eps_c
    itself (guidance off). `"auto"` is delta for intervals, else none.

    Holds one latent per denoiser. Works for one call per branch (conditional first) and for batched guidance, where
    only the conditional rows are computed. Two experts share nothing. Without an unconditional branch (guidance off or
    distilled into the model) it does nothing and the report says so. Negative prompts act through the branch: what is
    left out of it is left out of them. Beside a FeatureCache give it a multiple of the cache's interval: it saves work
    only at steps that the cache computes.
    """

    name: ClassVar[str] = "guidance_skip"
    summary: ClassVar[str] = "Half the work at some steps: the unconditional branch of guidance is skipped or reused."

    policy: Literal["interval", "window", "adaptive"] = knob("interval", "when the unconditional branch is computed")
    interval: int = knob(2, "compute it every n-th step (policy=interval); 1 is exact", low=1, high=16, step=1)
    start: float = knob(0.0, "where guidance begins (policy=window)", low=0.0, step=0.05)
    stop: float = knob(0.6, "where guidance ends (policy=window)", low=0.0, step=0.05)
    unit: Literal["progress", "sigma"] = knob("progress", "what start and stop are measured in (policy=window)")
    threshold: float = knob(
        0.991, "drop it above this cosine (policy=adaptive); above 1 is exact", low=-1.0, high=1.01, step=0.001
    )
    reuse: Literal["auto", "delta", "bands", "hold", "none"] = knob("auto", "what stands in for it")
    scale: float = knob(1.0, "factor on a reused delta (reuse=bands: on its coarse part)", low=0.0, high=2.0, step=0.05)
    fine_scale: float = knob(
        1.0, "factor on the fine part of a reused delta (reuse=bands)", low=0.0, high=2.0, step=0.05
    )
    first: int = knob(3, "first steps that always compute it (interval, adaptive)", low=0, step=1)
    last: int = knob(1, "last steps that always compute it (interval, adaptive)", low=0, step=1)

    def check(self) -> None:
        if self.policy == "window" and self.stop <= self.start:
            raise ConfigError(f"guidance_skip.stop is {self.stop}; it must be greater than start ({self.start})")
        if self.policy == "window" and self.unit == "progress" and self.start >= 1:
            raise ConfigError(f"guidance_skip.start is {self.start}; allowed with unit='progress': 0 <= start < 1")

    def build(self) -> GuidanceSkipMethod:
        return GuidanceSkipMethod(self)

    @property
    def filling(self) -> str:
        """What stands in for the branch, with "auto" resolved."""
        if self.reuse != "auto":
            return self.reuse
        return "delta" if self.policy == "interval" else "none"


def similarity(cond: Tensor, uncond: Tensor) -> float:
    """The smallest cosine of two predictions over the rows of a batch, in [-1, 1]."""
    a, b = cond.float().flatten(1), uncond.float().flatten(1)
    return float(torch.cosine_similarity(a, b, dim=1).min().clamp(-1.0, 1.0))


def estimate(cond: Tensor, memory: Tensor | None, filling: str, scale: float = 1.0) -> Tensor:
    """The unconditional prediction that stands in, a new tensor: `memory` is the last delta or the last eps_u."""
    if memory is None or filling == "none":
        return cond.clone()
    if filling == "hold":
        return memory.clone()
    return (cond.float() + scale * memory.float()).to(cond.dtype)


def scale_bands(x: Tensor, coarse: float, fine: float) -> Tensor:
    """`x` in float32 with its coarse Fourier band times `coarse` and the rest times `fine`; the last two dimensions are
    height and width. The coarse band is a disc of a fifth of the shorter side, as in FasterCache (arXiv 2410.19355).
    """
    if coarse == fine:
        return x.float() * coarse
    height, width = x.shape[-2:]
    rows, columns = torch.fft.fftfreq(height, 1 / height), torch.fft.fftfreq(width, 1 / width)
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= (min(height, width) // 5) ** 2
    factors = torch.where(inside, coarse, fine).to(x.device)
    scaled: Tensor = torch.fft.ifft2(torch.fft.fft2(x.float()) * factors).real
    return scaled


@dataclass
class GuidanceLedger:
    """What is remembered of one denoiser: the present step's conditional prediction, and the last pair."""

    cond: tuple[int, Tensor] | None = None
    memory: Tensor | None = None
    paired: int | None = None
    """Entry of the last step that had both branches."""
    dropped: int | None = None
    """Entry at which the adaptive policy dropped the branch."""
    asked: int = 0
    skipped: list[int] = field(default_factory=list)
    cosines: dict[int, float] = field(default_factory=dict)
    alone: bool = False
    """Whether the unconditional branch was ever called before the conditional one."""


class GuidanceSkipMethod(Method[GuidanceSkip]):
    """Outside every step method: what it leaves out, they never see."""

    layer: ClassVar[Layer] = Layer.GUIDANCE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_BRANCH})

    def begin(self, run: Run) -> None:
        config, sigma = self.config, run.clock.sigma
        if config.policy == "window" and config.unit == "sigma" and sigma != sigma:
            raise ConfigError("guidance_skip.unit is 'sigma', but this scheduler has no sigmas; use unit='progress'")

    def inspect(self, denoiser: DenoiserMap) -> str:
        return f"guidance of {denoiser.name}: {denoiser.cfg.value}"

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        ledger = run.state(self, GuidanceLedger, site=call.denoiser.name, branch="")
        self._refuse_tokens(call)
        rows = run.guidance_rows(call) if call.branch == "both" else None
        if rows is not None:
            return self._batched(run.clock, ledger, call, rows, proceed)
        if call.branch == "cond":
            prediction = proceed(call)
            ledger.cond = run.clock.index, prediction.detach()
            return prediction
        return self._separate(run.clock, ledger, call, proceed) if call.branch == "uncond" else proceed(call)

    def _refuse_tokens(self, call: StepCall) -> None:
        config = self.config
        if config.filling == "bands" and config.scale != config.fine_scale and call.sample.ndim < 4:
            raise ConfigError(
                f"{config.name}: {call.denoiser.name} takes latents as a list of tokens, which has no Fourier bands. "
                "Use reuse='delta', or the same factor for both bands."
            )

    def _separate(
        self, clock: Clock, ledger: GuidanceLedger, call: StepCall, proceed: Callable[[StepCall], Tensor]
    ) -> Tensor:
        """The unconditional call of a step; the conditional one has come before it."""
        ledger.asked += 1
        cond = ledger.cond[1] if ledger.cond is not None and ledger.cond[0] == clock.index else None
        if cond is None:
            ledger.alone = True
            return proceed(call)
        if self._computes(clock, ledger):
            uncond = proceed(call)
            self._remember(clock, ledger, cond, uncond)
            return uncond
        return self._fill(clock, ledger, cond)

    def _batched(
        self,
        clock: Clock,
        ledger: GuidanceLedger,
        call: StepCall,
        rows: Rows,
        proceed: Callable[[StepCall], Tensor],
    ) -> Tensor:
        """A call with both branches; `rows` are the unconditional and the conditional ones."""
        ledger.asked += 1
        if self._computes(clock, ledger):
            both = proceed(call)
            uncond, cond = halves(both, rows)
            self._remember(clock, ledger, cond, uncond)
            return both
        return conditional_alone(call, rows, proceed, lambda cond: self._fill(clock, ledger, cond))

    # --- decisions ----------------------------------------------------------------------------------------------
    def _computes(self, clock: Clock, ledger: GuidanceLedger) -> bool:
        """Whether the unconditional branch is computed at this step."""
        config = self.config
        if ledger.memory is None and config.filling != "none":
            return True
        if config.policy == "window":
            at = clock.fraction if config.unit == "progress" else clock.sigma
            return config.start <= at <= config.stop
        if clock.done < config.first or clock.left < config.last:
            return True
        if config.policy == "adaptive":
            return ledger.dropped is None
        return ledger.paired is None or clock.index - ledger.paired >= config.interval

    def _remember(self, clock: Clock, ledger: GuidanceLedger, cond: Tensor, uncond: Tensor) -> None:
        """Both branches were computed."""
        config, ledger.paired = self.config, clock.index
        if config.filling in ("delta", "bands"):
            ledger.memory = (uncond.float() - cond.float()).to(cond.dtype)
        elif config.filling == "hold":
            ledger.memory = uncond.detach().clone()
        if config.policy == "adaptive" and ledger.dropped is None:
            cosine = ledger.cosines[clock.index] = similarity(cond, uncond)
            if cosine > config.threshold and clock.done + 1 >= config.first:
                ledger.dropped = clock.index

    def _fill(self, clock: Clock, ledger: GuidanceLedger, cond: Tensor) -> Tensor:
        ledger.skipped.append(clock.index)
        if self.config.filling == "bands" and ledger.memory is not None:
            return (cond.float() + scale_bands(ledger.memory, *self._factors(clock, ledger.memory))).to(cond.dtype)
        return estimate(cond, ledger.memory, self.config.filling, self.config.scale)

    def _factors(self, clock: Clock, memory: Tensor) -> tuple[float, float]:
        """Factors on the coarse and the fine part of the reused difference at this step."""
        return self.config.scale, self.config.fine_scale

    # --- report -------------------------------------------------------------------------------------------------
    def _ledgers(self, run: Run) -> dict[str, GuidanceLedger]:
        return {site: ledger for (_, site), ledger in run.states(self).items()}

    def engaged(self, run: Run) -> tuple[bool, str]:
        found = list(self._ledgers(run).values())
        asked, skipped = sum(s.asked for s in found), sum(len(s.skipped) for s in found)
        if skipped:
            return True, f"the unconditional branch was left out at {skipped} of {asked} steps"
        if not asked:
            return False, "no unconditional branch was seen: guidance is off, or distilled into the model"
        if any(s.alone for s in found):
            return False, "the pipeline calls the unconditional branch before the conditional one it is made from"
        return False, self._idle_reason([c for s in found for c in s.cosines.values()])

    def _idle_reason(self, cosines: list[float]) -> str:
        config = self.config
        if config.policy == "adaptive" and cosines:
            return (
                f"no step was skipped: the cosine of both branches was {min(cosines):.4g} to {max(cosines):.4g}, to be "
                f"above threshold {config.threshold:g} before the protected last steps"
            )
        if config.policy == "window":
            return f"no step was skipped: all of them lie in the window {config.start:g}..{config.stop:g}"
        return f"no step was skipped: interval={config.interval}, first={config.first}, last={config.last} leave none"

    def details(self, run: Run) -> Mapping[str, Any]:
        return {
            name: {
                "computed": ledger.asked - len(ledger.skipped),
                "total": ledger.asked,
                "skipped_steps": list(ledger.skipped),
                "dropped_at": ledger.dropped,
                "cosine": {str(i): round(c, 6) for i, c in ledger.cosines.items()},
                "bytes_held": 0 if ledger.memory is None else ledger.memory.numel() * ledger.memory.element_size(),
            }
            for name, ledger in self._ledgers(run).items()
        }
