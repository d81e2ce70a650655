"""Step Rehash: steps whose features resemble the step before's take them over, as profiled on your model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffeff.anatomy.types import DenoiserMap, Segment
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.errors import ConfigError
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.policy import Interval, Policy
from diffeff.methods.caching.predictor import time_axis
from diffeff.methods.caching.ranges import DepthOf
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["RehashSite", "StepRehash", "most_similar"]


def most_similar(options: StepRehash, clock: Clock) -> frozenset[int]:
    """The entries of this run that take over the features of an earlier one, most similar first.

    The angle between the features of two steps is read off the profile and stretched to the run's own distance of
    steps, so that a profile holds at other numbers of steps.
    """
    axis = time_axis(clock)
    wanted = round(options.share * clock.length)
    candidates = range(clock.first + max(options.first, 1), clock.total - options.last)
    order = sorted(candidates, key=lambda i: (_angle(options, axis[i - 1], axis[i]), i))
    chosen: set[int] = set()
    for entry in order:
        if len(chosen) < wanted and _in_a_row(chosen | {entry}, entry) <= options.cap:
            chosen.add(entry)
    return frozenset(chosen)


def _angle(options: StepRehash, before: float, now: float) -> float:
    """Estimated angle between the features at two times."""
    times, cosines = np.array(options.times), np.array(options.similarities)
    rates = np.arccos(cosines.clip(-1, 1)) / np.abs(np.diff(times))
    middles = (times[1:] + times[:-1]) / 2
    order = np.argsort(middles)
    return float(np.interp((before + now) / 2, middles[order], rates[order])) * abs(now - before)


def _in_a_row(entries: set[int], entry: int) -> int:
    """How many consecutive entries stand around `entry`."""
    low = high = entry
    while low - 1 in entries:
        low -= 1
    while high + 1 in entries:
        high += 1
    return high - low + 1


@dataclass(frozen=True)
class RehashSite(DepthOf):
    """Everything before the last temporal layer of the up path (UNets), or all blocks but the outer ones."""

    head: int = 1
    tail: int = 1
    options: StepRehash | None = None

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """The one part or run."""
        if not denoiser.residual:
            return super().ranges(denoiser)
        total = len(denoiser.blocks)
        return (denoiser.segment(self.head, total - 1 - self.tail),) if self.head + self.tail < total else ()

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """All entries but the most similar ones."""
        if self.options is None:
            return None
        return AtEntries(frozenset(range(clock.total)) - most_similar(self.options, clock))

    def refusal(self, denoiser: DenoiserMap) -> str:
        """The outer blocks are all there are."""
        if not denoiser.residual:
            return super().refusal(denoiser)
        return (
            f"no block of {denoiser.name} is left between the {self.head} first and {self.tail} last ones (it has "
            f"{len(denoiser.blocks)}). Lower head or tail."
        )


@dataclass(frozen=True, kw_only=True)
class StepRehash(CacheConfig):
    """The steps that change least, as measured on your model, compute only the outermost layers.

    A profile run has measured the cosine between each step's features and those of the step before, behind a temporal
    layer late in the up path. The share `share` of the run's steps with the highest cosine takes over those features,
    no more than `cap` in a row, so that stable parts alternate full, rehashed, full, rehashed. Such a step computes the
    outermost layers with fresh skip connections. In transformers all blocks but the `head` first and `tail` last ones
    are taken over, as what they add.

    `times` and `similarities` are the profile: the noise level of every profiled step, and the cosine of each to the
    next (one value less). Make them with `diffeff.search.profiles.similarity_profile`.

    Differs: the paper publishes no code for this part and its numbers were not at hand: the rule is our reading of its
    idea.

    Defaults: `share`, `first` and `last` are ours, to be tuned.

    Holds one feature map (or residual) per branch, and overwrites it: no memory is added at the peak of a UNet's inner
    levels.

    Source: Step Rehash, in Streamlined Inference (arXiv 2411.01171).
    """

    name: ClassVar[str] = "step_rehash"
    summary: ClassVar[str] = "Steps that resemble the step before take over its features, as profiled on your model."

    times: tuple[float, ...] = knob((), "noise level (or index) of each profiled step")
    similarities: tuple[float, ...] = knob((), "cosine of each profiled step's features to the next one's")
    share: float = knob(0.4, "share of the steps that take over features", low=0.0, high=0.95, step=0.05)
    cap: int = knob(1, "most such steps in a row", low=1, high=8, step=1)
    first: int = knob(3, "first steps that are always computed", low=1, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    level: int = knob(0, "outermost level that is always computed in part (UNets)", low=0, step=1)
    layer: int = knob(0, "layers of that level always computed besides the last (UNets)", low=0, step=1)
    head: int = knob(1, "first blocks that are always computed (transformers)", low=0, step=1)
    tail: int = knob(1, "last blocks that are always computed (transformers)", low=0, step=1)

    def check(self) -> None:
        if self.times and len(self.similarities) != len(self.times) - 1:
            raise ConfigError(
                f"step_rehash.similarities has {len(self.similarities)} values; {len(self.times)} times need "
                f"{len(self.times) - 1}"
            )
        if self.times and not (np.all(np.diff(self.times) < 0) or np.all(np.diff(self.times) > 0)):
            raise ConfigError("step_rehash.times must rise or fall from one to the next, and hold two at least")

    def recipe(self) -> Recipe:
        missing = (
            "it has no similarity profile of this model (times, similarities). Make one with "
            "diffeff.search.profiles.similarity_profile(pipe, job, config)."
        )
        site = RehashSite(self.level, self.layer, self.head, self.tail, self)
        return Recipe(
            site,
            Interval(1),
            first=self.first,
            last=self.last,
            exact=self.share == 0,
            missing="" if len(self.times) > 1 else missing,
        )
