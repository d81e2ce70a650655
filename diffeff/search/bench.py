"""Candidates tried on the pipeline: fidelity on the tuning seeds, then speed and fidelity on seeds never tuned on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffeff.core.config import Config
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.eval.metrics.fidelity import psnr
from diffeff.methods.caching.scheduled import ScheduledCache
from diffeff.methods.sampling.fitted_solver import FittedSolver
from diffeff.plan import Plan
from diffeff.search.points import Candidate, Measured, Point

__all__ = ["FRESH", "Bench", "Cost", "decibels_of"]

Frames = NDArray[np.float32]
FRESH = 7919
"""Added to the tuning seeds for the measured runs."""
CEILING = 100.0
"""dB that count for identical pixels in a mean."""


@dataclass(frozen=True)
class Cost:
    """What a run of one row takes, in seconds: apart from denoising, per computed branch, per step of the loop."""

    fixed: float
    branch: float
    step: float

    def seconds(self, branches: float, steps: int) -> float:
        """Of a run of `steps` steps that computes so many branches."""
        return self.fixed + branches * self.branch + steps * self.step


@dataclass
class Bench:
    """Runs candidates of one call: `prompts` with their `seeds`, and all other arguments of the pipeline in `call`.

    `argument` is what the pipeline calls its prompts. The pipeline's own plan must be off, and is when a run ends.
    """

    pipe: Any
    prompts: Sequence[Any]
    seeds: Sequence[int]
    call: Mapping[str, Any]
    argument: str = "prompt"
    seconds: float = 0.0
    """Of the last call."""
    computed: float = 0.0
    """Denoiser calls that the last run computed, branches counted apart."""
    stages: dict[str, float] = field(default_factory=dict)
    branches: float = 0.0
    """The same of the plain run."""
    exact: tuple[Config, ...] = ()
    """Methods that leave the result as it is and change what a branch takes."""
    beside: tuple[Config, ...] = ()
    """Those of them that candidates carry, first in their plans."""
    _plain: Frames | None = None
    _costs: dict[tuple[Config, ...], Cost] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.call["num_inference_steps"])

    def frames(self, plan: Plan, steps: int, rows: Sequence[int], shift: int = 0) -> Frames:
        """Pixels [rows, ..., 3] of some prompts in one call."""
        generators = [torch.Generator().manual_seed(self.seeds[row] + shift) for row in rows]
        given = {self.argument: [self.prompts[row] for row in rows], "generator": generators, "output_type": "np"}
        self.pipe.apply(plan)
        start = time.perf_counter()
        try:
            with torch.no_grad():  # the pixels are on the CPU when the call returns: nothing is left to wait for
                output = self.pipe(**dict(self.call) | given | {"num_inference_steps": steps})
            self.seconds = time.perf_counter() - start
        finally:
            self._note()
            self.pipe.remove()
        found = getattr(output, "frames", None)
        pixels = np.asarray(output.images if found is None else found, dtype=np.float32)
        return pixels if pixels.ndim == 5 else pixels[:, None]

    def _note(self) -> None:
        report = self.pipe.report
        self.computed = 0.0 if report is None else sum(share.computed for share in report.steps.values())
        self.stages = {} if report is None else dict(report.seconds)

    # --- fidelity on the tuning seeds ---------------------------------------------------------------------------
    def plain(self) -> Frames:
        """The plain run of all prompts; also what its stages take and how many branches it computes."""
        if self._plain is None:
            self._plain = self.frames(Plan(), self.steps, range(len(self.prompts)))
            self.branches = self.computed
        return self._plain

    def try_out(self, candidate: Candidate) -> Point:
        """Run a candidate on the tuning seeds, all prompts in one call."""
        plain = self.plain()
        found = self.frames(candidate.plan, candidate.steps, range(len(self.prompts)))
        share = self.computed / self.branches
        beside = tuple(config for config in candidate.plan.methods if config in self.exact)
        gain = self.gain(self.computed, _loop(candidate), beside)
        return Point(candidate, _mean([decibels_of(a, b) for a, b in zip(plain, found, strict=True)]), share, gain)

    def gain(self, branches: float, steps: int, beside: tuple[Config, ...]) -> float:
        """The speed-up that computing so many branches in so many steps should give, with the methods of `beside` on;
        encoding, decoding and the pipeline's own loop counted."""
        self.plain()
        whole = self.cost(()).seconds(self.branches, self.steps)
        return whole / self.cost(beside).seconds(branches, steps)

    def cost(self, beside: tuple[Config, ...]) -> Cost:
        """What single runs take with the methods of `beside` on: from a whole run, and one that computes two steps."""
        if beside not in self._costs:
            whole, little = self._stages(beside), self._stages((*beside, _two_steps(self.steps)))
            (denoise, branches, fixed), (rest, few, _) = whole, little
            branch = max(denoise - rest, 0.0) / max(branches - few, 1.0) if few < branches else denoise / branches
            step = max(denoise - branches * branch, 0.0) / self.steps
            self._costs[beside] = Cost(fixed, branch, step)
        return self._costs[beside]

    def _stages(self, configs: tuple[Config, ...]) -> tuple[float, float, float]:
        """Seconds of denoising, branches computed, and all other seconds of a run of the first prompt: the faster of
        two."""
        found = []
        for _ in range(2):
            try:
                self.frames(Plan(configs), self.steps, [0])
            except MethodInapplicable:  # a pipeline whose steps cannot be left out: all of it counts per branch
                self.frames(Plan([c for c in configs if c in self.exact]), self.steps, [0])
            denoise = self.stages.get("denoise", 0.0)
            found.append((denoise, self.computed, max(self.stages.get("total", 0.0) - denoise, 0.0)))
        return min(found, key=_seconds_of)

    # --- speed and fidelity on fresh seeds ----------------------------------------------------------------------
    def measure(
        self, points: Sequence[Point], rounds: int = 1, observe: Callable[[float], None] = lambda done: None
    ) -> list[Point]:
        """Candidates against the plain run, one prompt at a time, taking turns in reversed order every other time."""
        if rounds < 1:
            raise ConfigError(f"rounds is {rounds}; at least 1 is needed to measure anything")
        arms = [Candidate("plain", "plain", Plan(), self.steps), *(p.candidate for p in points)]
        decibels: list[list[float]] = [[] for _ in arms]
        ratios: list[list[float]] = [[] for _ in arms]
        for arm in arms:  # a call of one row may not have run before
            self._timed(arm, 0, FRESH)
        turns = [(number, row) for number in range(rounds) for row in range(len(self.prompts))]
        for done, (number, row) in enumerate(turns):
            order = range(len(arms)) if done % 2 == 0 else range(len(arms) - 1, -1, -1)
            found = {n: self._timed(arms[n], row, FRESH * (number + 1)) for n in order}
            for n, (seconds, frames) in found.items():
                ratios[n].append(found[0][0] / seconds)
                decibels[n].append(decibels_of(found[0][1], frames))
            observe((done + 1) / len(turns))
        return [
            Point(p.candidate, p.psnr, p.share, p.expected_speedup, _measured(decibels[n + 1], ratios[n + 1]))
            for n, p in enumerate(points)
        ]

    def _timed(self, arm: Candidate, row: int, shift: int) -> tuple[float, Frames]:
        """Seconds of one call as the pipeline's caller sees it; putting the plan on is not part of them."""
        frames = self.frames(arm.plan, arm.steps, [row], shift)
        return self.seconds, frames[0]


def _seconds_of(run: tuple[float, float, float]) -> float:
    """Seconds of a run, denoising and the rest."""
    return run[0] + run[2]


def _two_steps(steps: int) -> ScheduledCache:
    """Computes the first step and the last."""
    return ScheduledCache(actions=("both", *("none",) * (steps - 2), "both"), predictors=("hold",) * (steps - 2))


def _loop(candidate: Candidate) -> int:
    """Steps of the pipeline's loop: a fitted solver sets its own."""
    own = [config.calls for config in candidate.plan.methods if isinstance(config, FittedSolver)]
    return own[0] if own else candidate.steps


def decibels_of(a: Frames, b: Frames) -> float:
    """PSNR in dB, at most CEILING."""
    return min(psnr(a, b), CEILING)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _measured(decibels: Sequence[float], ratios: Sequence[float]) -> Measured:
    mean_low, mean_high = _interval(decibels, np.mean)
    low, high = _interval(ratios, np.median)
    return Measured(
        _mean(decibels), mean_low, mean_high, min(decibels), float(np.median(ratios)), low, high, len(ratios)
    )


def _interval(values: Sequence[float], statistic: Callable[..., Any]) -> tuple[float, float]:
    """95 % percentile bootstrap over runs; the value itself for a single one."""
    items = np.asarray(values, dtype=np.float64)
    drawn = items[np.random.default_rng(0).integers(0, len(items), (1000, len(items)))]
    low, high = np.quantile(statistic(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)
