"""Profiles of a plain run that some caches are made from: similar steps, errors of reuse by kind, blocks that drift.

Each takes a DiffEffPipeline without a plan, a job (prompts, seeds, call) and a config of its method, runs the job once
as one batch, and gives the config with the profile filled in. Times are noise levels where the scheduler has distinct
ones, so that profiles hold at other numbers of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffeff.anatomy.types import BlockSite, DenoiserMap, ModuleSite, Segment, Streams
from diffeff.core.config import Config
from diffeff.core.method import Layer, Method, Outputs
from diffeff.core.run import Run
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.module_cache import MODULES
from diffeff.methods.caching.predictor import time_axis
from diffeff.methods.caching.published.profilingdit import ProfilingDiT
from diffeff.methods.caching.published.smoothcache import SmoothCache
from diffeff.methods.caching.published.step_rehash import RehashSite, StepRehash
from diffeff.methods.caching.track import parts_of
from diffeff.search.trace import Job, attached

__all__ = ["block_drift", "block_drifts", "error_table", "similarity_profile"]


@dataclass(frozen=True, kw_only=True)
class Profiler(Config):
    """Changes nothing, measures."""

    name: ClassVar[str] = "profiler"
    summary: ClassVar[str] = "Measures a plain run for a cache."


class _Profile(Method[Profiler]):
    """Collects numbers by step; the tensors it needs for that live in the run."""

    layer: ClassVar[Layer] = Layer.SEGMENT

    def __init__(self) -> None:
        super().__init__(Profiler())
        self.times: tuple[float, ...] = ()
        self.rows: dict[Any, list[float]] = {}

    def begin(self, run: Run) -> None:
        self.times, self.rows = time_axis(run.clock), {}

    def note(self, key: Any, value: Tensor) -> None:
        """One number under `key`."""
        self.rows.setdefault(key, []).append(float(value))

    def mean(self, key: Any) -> float:
        """The mean of what was noted; nan where nothing was."""
        found = self.rows.get(key)
        return float(np.mean(found)) if found else float("nan")

    @staticmethod
    def conditional(run: Run, x: Tensor | None) -> Tensor | None:
        """The rows of the branch that is measured: the conditional one, in float32."""
        if run.call is None or x is None:
            return None
        part = next((p for p in parts_of(run, run.call) if p.branch == "cond"), None)
        return None if part is None else part.of(x, run.call.rows).detach().float()


@dataclass
class _Last:
    """The newest tensors of one site, newest last, with their steps."""

    kept: deque[tuple[int, Tensor]] = field(default_factory=deque)

    def push(self, index: int, x: Tensor, most: int) -> None:
        self.kept.append((index, x))
        while len(self.kept) > most:
            self.kept.popleft()


# --- similar steps ------------------------------------------------------------------------------------------------
class _Similarity(_Profile):
    """Cosine of a segment's result to the step before's."""

    def __init__(self, site: RehashSite) -> None:
        super().__init__()
        self.site = site

    def segments(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        return self.site.ranges(denoiser)

    def leave_segment(self, run: Run, segment: Segment, before: Streams, after: Streams) -> None:
        found = self.conditional(run, after.image - before.image if segment.residual else after.image)
        if found is None:
            return
        last, index = run.state(self, _Last, site=segment.name, branch=""), run.clock.index
        for at, x in last.kept:
            if at == index - 1 and x.shape == found.shape:
                self.note(at, torch.cosine_similarity(x.flatten(1), found.flatten(1)).mean())
        last.push(index, found, 1)


def similarity_profile(pipe: Any, job: Job, config: StepRehash) -> StepRehash:
    """`config` with the similarity of each step's features to the next one's, measured on a plain run of `job`.

    Raises MethodInapplicable where the model has no such features, ConfigError for a job of fewer than 3 steps.
    """
    site = RehashSite(config.level, config.layer, config.head, config.tail)
    _refuse(config, [site.refusal(d) for d in pipe.denoisers if not site.ranges(d)])
    profile = _Similarity(site)
    _measure(pipe, job, profile)
    cosines = _filled([profile.mean(i) for i in range(len(profile.times) - 1)])
    return replace(config, times=_rounded(profile.times), similarities=_rounded(cosines))


# --- errors of reuse ----------------------------------------------------------------------------------------------
class _Errors(_Profile):
    """Relative L1 error of repeating a module's output, by kind, step and distance."""

    layer: ClassVar[Layer] = Layer.MODULE

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        outputs = proceed()
        found = self.conditional(run, outputs[0])
        if found is not None and run.call is not None:
            name = f"{run.call.denoiser.name}.{site.name}"
            last, index = run.state(self, _Last, site=name, branch=""), run.clock.index
            for at, x in last.kept:
                if x.shape == found.shape and index > at:
                    self.note((site.kind, index, index - at), _relative(found, x))
            last.push(index, found, self.horizon)
        return outputs


def error_table(pipe: Any, job: Job, config: SmoothCache) -> SmoothCache:
    """`config` with the errors of repeating each kind of module's output, measured on a plain run of `job`.

    Holds the last `horizon` outputs of every module meanwhile.
    """
    profile = _Errors(config.horizon)
    _measure(pipe, job, profile)
    present = {site.kind for denoiser in pipe.denoisers for site in denoiser.modules}
    kinds = tuple(kind for kind in MODULES if kind in present)
    distances, entries = range(1, config.horizon + 1), range(len(profile.times))
    means = [profile.mean((kind, i, k)) for kind in kinds for i in entries for k in distances]
    unknown = 1e9  # JSON has neither nan nor inf: no threshold reaches this
    errors = [unknown if value != value else value for value in means]
    return replace(config, kinds=kinds, times=_rounded(profile.times), errors=_rounded(errors))


# --- blocks that drift --------------------------------------------------------------------------------------------
class _Drifts(_Profile):
    """Relative L1 change of what each block adds, from step to step."""

    def around_block(
        self, run: Run, site: BlockSite, streams: Streams, proceed: Callable[[Streams], Streams]
    ) -> Streams:
        after = proceed(streams)
        found = self.conditional(run, after.image - streams.image)
        if found is not None and run.call is not None:
            name = f"{run.call.denoiser.name}.{site.name}"
            last = run.state(self, _Last, site=name, branch="")
            for _, x in last.kept:
                self.note(site.index, _relative(found, x))
            last.push(run.clock.index, found, 1)
        return after


def block_drifts(pipe: Any, job: Job) -> Mapping[int, float]:
    """How much what each block adds changes from step to step (relative L1, mean over the run), by block index.

    Raises MethodInapplicable for UNets.
    """
    unets = [f"{d.name} is a UNet, whose blocks add nothing to their input" for d in pipe.denoisers if not d.residual]
    _refuse(ProfilingDiT(), unets)
    profile = _Drifts()
    _measure(pipe, job, profile)
    return {index: profile.mean(index) for index in sorted(profile.rows)}


def block_drift(pipe: Any, job: Job, config: ProfilingDiT, share: float = 0.6) -> ProfilingDiT:
    """`config` with the `share` of the blocks that drift least (the authors' lists hold 60 % and 70 % of all)."""
    if not 0 < share < 1:
        raise ConfigError(f"share is {share}; allowed: 0 < share < 1")
    drifts = block_drifts(pipe, job)
    count = max(round(share * len(drifts)), 1)
    return replace(config, blocks=tuple(sorted(sorted(drifts, key=lambda i: drifts[i])[:count])))


# --- shared -------------------------------------------------------------------------------------------------------
def _measure(pipe: Any, job: Job, profile: _Profile) -> None:
    with attached(pipe, profile) as run:
        run(job)
    if len(profile.times) < 3:
        raise ConfigError(f"a profile needs at least 3 steps; the job has {len(profile.times)}")


def _refuse(config: Config, reasons: list[str]) -> None:
    if reasons:
        raise MethodInapplicable(f"{config.name}: {reasons[0]}")


def _relative(new: Tensor, old: Tensor) -> Tensor:
    """Relative L1 distance of the older tensor to the newer one."""
    return (new - old).abs().mean() / new.abs().mean().clamp_min(1e-12)


def _filled(values: list[float]) -> list[float]:
    """nan replaced by the nearest known value."""
    known = [i for i, v in enumerate(values) if v == v]
    if not known:
        raise MethodInapplicable("no conditional branch was seen in the profile run: nothing could be measured")
    return [values[min(known, key=lambda k: abs(k - i))] for i in range(len(values))]


def _rounded(values: Any) -> tuple[float, ...]:
    """Seven digits: what float32 measurements hold, and short in a plan."""
    return tuple(float(f"{value:.7g}") for value in values)
