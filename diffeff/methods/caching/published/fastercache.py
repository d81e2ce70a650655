"""FasterCache: attention outputs are extrapolated at every other step, the unconditional branch at most steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, ModuleSite
from diffeff.core.config import knob
from diffeff.core.method import Claim, Layer
from diffeff.core.run import Clock, Run, StepCall
from diffeff.methods.caching.entries import every, thousandths, within
from diffeff.methods.caching.module_cache import ATTENTIONS, ModuleCache, Modules
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.predictor import Axis, Predictor
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.guidance.guidance_skip import GuidanceLedger, GuidanceSkip, GuidanceSkipMethod

__all__ = ["FasterCache"]

_COARSE, _FINE = (99.0, 901.0), (-1.0, 301.0)
"""Timesteps between which the coarse and the fine part of the guidance difference are enlarged."""


@dataclass(frozen=True)
class _Leaning:
    """y1 + w (y1 - y2) of the last two computed outputs; w grows from 0 to 1 over the run unless it is given."""

    axis: ClassVar[Axis] = "index"
    begin: int
    length: int
    weight: float | None

    @property
    def snapshots(self) -> int:
        return 2

    def coefficients(self, times: Sequence[float], t: float) -> tuple[float, ...]:
        if len(times) == 1:
            return (1.0,)
        w = (t - self.begin) / self.length if self.weight is None else self.weight
        return (-w, 1 + w)


@dataclass(frozen=True, kw_only=True)
class FasterCache(CacheConfig):
    """Half of the attention and most of the unconditional branch are skipped in the later part of the run.

    Below timestep `attention_below`, attention is computed at every `interval`-th step of the run and extrapolated in
    between: y1 + w (y1 - y2) from its last two outputs, with w growing from 0 to 1 over the run (or `weight`). Below
    timestep `guidance_below` the unconditional branch is computed at every `guidance_interval`-th step; in between it
    is the conditional one plus the last known difference, whose coarse Fourier band counts `coarse` times between
    timesteps 901 and 99 and whose fine band counts `fine` times below 301.

    Defaults: the paper's and diffusers'.

    Differs: their code multiplies the stored differences in place at every skipped step, so that the factors compound
    to 1.1, 1.21, 1.33, ... until the next full step; here a factor is a factor. And each branch has its own attention
    history, so separate guidance calls work, either half of the batch may be the unconditional one, and attention is
    reused for whichever branch is computed. Latents that come as a list of tokens have no bands: the plain difference
    stands in, and the report says so.

    Holds two outputs per attention and branch, and one latent.

    Source: FasterCache (arXiv 2410.19355).
    """

    name: ClassVar[str] = "fastercache"
    summary: ClassVar[str] = "Attention is extrapolated at every other step, the unconditional branch at most steps."

    interval: int = knob(2, "compute attention every n-th step; 1 leaves it alone", low=1, high=8, step=1)
    attention_below: float = knob(681.0, "timestep (0 to 1000) below which attention is reused", low=0.0, step=10)
    weight: float | None = knob(None, "weight of the extrapolation; none: from 0 to 1 over the run", low=0.0, high=1.0)
    guidance_interval: int = knob(5, "compute the unconditional branch every n-th step", low=1, high=16, step=1)
    guidance_below: float = knob(641.0, "timestep (0 to 1000) below which it is skipped", low=0.0, step=10)
    coarse: float = knob(1.1, "factor on the coarse part of the guidance difference", low=0.0, high=2.0, step=0.05)
    fine: float = knob(1.1, "factor on the fine part of the guidance difference", low=0.0, high=2.0, step=0.05)

    def _rule(self, site: ModuleSite, clock: Clock) -> Policy:
        return every(clock, self.interval, within(clock, -1, self.attention_below))

    def _predictor(self, clock: Clock) -> Predictor:
        return _Leaning(clock.first, max(clock.length, 1), self.weight)

    def recipe(self) -> Recipe:
        exact = self.interval == 1 and self.guidance_interval == 1
        return Recipe(Modules(ATTENTIONS, rule=self._rule, predictor=self._predictor), Interval(1), exact=exact)

    def build(self) -> FasterCacheMethod:
        return FasterCacheMethod(self)


class _BandedGuidance(GuidanceSkipMethod):
    """The unconditional branch as FasterCache leaves it out."""

    def __init__(self, options: FasterCache) -> None:
        super().__init__(GuidanceSkip(reuse="bands", scale=options.coarse, fine_scale=options.fine))
        self.options = options

    def _refuse_tokens(self, call: StepCall) -> None:
        """Lists of tokens take the plain difference."""

    def _computes(self, clock: Clock, ledger: GuidanceLedger) -> bool:
        options = self.options
        window = within(clock, -1, options.guidance_below)
        return ledger.memory is None or clock.index in every(clock, options.guidance_interval, window).computed

    def _factors(self, clock: Clock, memory: Tensor) -> tuple[float, float]:
        if memory.ndim < 4:
            return 1.0, 1.0
        t = thousandths(clock)[clock.index]
        coarse = self.options.coarse if _COARSE[0] < t < _COARSE[1] else 1.0
        return coarse, self.options.fine if _FINE[0] < t < _FINE[1] else 1.0


class FasterCacheMethod(ModuleCache):
    """Attention at the module site, and guidance around the step."""

    layer: ClassVar[Layer] = Layer.GUIDANCE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_MODULE, Claim.SKIP_BRANCH})

    def __init__(self, config: FasterCache) -> None:
        recipe = config.recipe()
        super().__init__(config, recipe, recipe.site)  # type: ignore[arg-type]
        self.guidance = _BandedGuidance(config)

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {**super().claimed(denoiser), Claim.SKIP_BRANCH: frozenset({"*"})}

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        if call.sample.ndim < 4:
            run.warn("fastercache: latents are a list of tokens without Fourier bands; the plain difference is reused")
        return self.guidance.around_step(run, call, proceed)

    def engaged(self, run: Run) -> tuple[bool, str]:
        attention, guidance = super().engaged(run), self.guidance.engaged(run)
        return attention[0] or guidance[0], f"attention: {attention[1]}; guidance: {guidance[1]}"

    def details(self, run: Run) -> Mapping[str, Any]:
        return {**super().details(run), "guidance": dict(self.guidance.details(run))}
