"""AdaCache: the less one attention's output has moved, the longer everything is reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, ModuleSite
from diffeff.core.config import knob
from diffeff.core.method import Outputs
from diffeff.core.run import Run
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.indicator import relative_change
from diffeff.methods.caching.module_cache import ATTENTIONS, MODULES, ModuleCache, Modules
from diffeff.methods.caching.policy import Codebook
from diffeff.methods.caching.ranks import Ranks
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.track import Track

__all__ = ["AdaCache"]


@dataclass(frozen=True, kw_only=True)
class AdaCache(CacheConfig):
    """Videos that move little are given fewer computed steps: the schedule follows the content.

    At every computed step, the output of one monitored attention is compared with the one before: their relative L1
    change per step in between, looked up in the codebook, says when to compute again: `intervals[n]` steps later while
    the change is below `limits[n]`, at the next step above the last limit. Until then all attention and feed-forward
    outputs are repeated, before gate and residual sum. One number is read back from the device per computed step.

    Defaults: the codebook is the authors' for 30 steps (fast).

    Differs: where they average the change over several layers, one attention (that of `block`, by default of the middle
    one) is monitored; their motion regularisation, which enlarges the change for moving content, is not built. The
    conditional branch decides for all; histories are kept per branch.

    Holds one output per module and branch.

    Source: AdaCache (arXiv 2411.02397).
    """

    name: ClassVar[str] = "adacache"
    summary: ClassVar[str] = "The less one attention's output has moved, the longer all modules are reused."

    PUBLISHED: ClassVar[Mapping[str, Mapping[str, tuple[float, ...]]]] = {
        "30 steps, fast": {"limits": (0.08, 0.16, 0.24, 0.32, 0.4, 1.0), "intervals": (6, 5, 4, 3, 2, 1)},
        "100 steps": {"limits": (0.03, 0.05, 0.07, 0.09, 0.11, 1.0), "intervals": (12, 10, 8, 6, 4, 3)},
    }

    limits: tuple[float, ...] = knob((0.08, 0.16, 0.24, 0.32, 0.4, 1.0), "changes per step, rising", low=0.0)
    intervals: tuple[int, ...] = knob((6, 5, 4, 3, 2, 1), "steps to the next computed one, below each limit", low=1)
    block: int | None = knob(None, "block whose attention is monitored; none: the middle one", low=0, step=1)
    first: int = knob(1, "first steps that are always computed", low=1, step=1)
    last: int = knob(2, "last steps that are always computed", low=0, step=1)

    def check(self) -> None:
        if not self.limits or len(self.limits) != len(self.intervals) or list(self.limits) != sorted(set(self.limits)):
            raise ConfigError(
                f"adacache: limits {self.limits} and intervals {self.intervals} must be as many, at least one, with "
                "rising limits"
            )

    def recipe(self) -> Recipe:
        exact = max(self.intervals) == 1
        policy = Codebook(self.limits, self.intervals)
        return Recipe(Modules(MODULES), policy, first=self.first, last=self.last, exact=exact)

    def build(self) -> AdaCacheMethod:
        return AdaCacheMethod(self)


@dataclass
class _Monitor:
    """What the monitored attention has shown: the change that decides at this step, and the one for the next."""

    index: int = -1
    drift: float | None = None
    fresh: float | None = None
    output: Tensor | None = None
    at: int = 0
    ranks: Ranks | None = None
    """The processes that must decide alike: asked once per measurement, not once per module."""

    def turn(self, index: int) -> None:
        """A module of step `index` is reached: from its first one on, the newest measurement decides."""
        if index != self.index:
            self.index, self.drift = index, self.fresh

    def measure(self, output: Tensor) -> None:
        """The monitored attention was computed."""
        if self.output is not None and self.index > self.at:
            change = relative_change(output, self.output) / (self.index - self.at)
            self.fresh = change if self.ranks is None else self.ranks.largest(change)
        self.output, self.at = output, self.index


@dataclass
class _Watching:
    """The indicator of one module: it shows the monitor's change, and feeds it where it is the monitored one."""

    monitor: _Monitor
    feeds: bool

    def change(self, x: Tensor) -> float | None:
        return self.monitor.drift

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        if self.feeds and output is not None:
            self.monitor.measure(output)


class AdaCacheMethod(ModuleCache):
    """All modules under the decision of one."""

    def __init__(self, config: AdaCache) -> None:
        recipe = config.recipe()
        super().__init__(config, recipe, recipe.site)  # type: ignore[arg-type]
        self.options = config

    @property
    def decides(self) -> str:
        return "batch together"

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        super().bind(denoisers)
        for denoiser in denoisers:
            self._monitored(denoiser)

    def _monitored(self, denoiser: DenoiserMap) -> str:
        """The site that is watched."""
        sites = [m for m in denoiser.modules if m.kind in ATTENTIONS and m.kind != "cross"]
        blocks = sorted({site.block for site in sites})
        chosen = blocks[len(blocks) // 2] if blocks and self.options.block is None else self.options.block
        found = [site.name for site in sites if site.block == chosen]
        if not found:
            raise MethodInapplicable(
                f"adacache: block {chosen} of {denoiser.name} has no self or joint attention to monitor. Blocks that "
                f"have one: {', '.join(map(str, blocks)) or 'none'}."
            )
        return found[0]

    def _monitor(self, run: Run, denoiser: DenoiserMap) -> _Monitor:
        make = lambda: _Monitor(ranks=self._sharing(run, denoiser))  # noqa: E731
        return run.state(self, make, site=f"monitor {denoiser.name}", branch="")

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        if run.call is not None:
            self._monitor(run, run.call.denoiser).turn(run.clock.index)
        return super().around_module(run, site, hidden, proceed)

    def _new_track(self, run: Run, site: ModuleSite) -> Track:
        track = super()._new_track(run, site)
        if run.call is not None:
            denoiser = run.call.denoiser
            track.indicator = _Watching(self._monitor(run, denoiser), site.name == self._monitored(denoiser))
        return track
