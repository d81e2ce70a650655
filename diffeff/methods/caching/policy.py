"""When to compute: frozen rules that combine, each saying for one step whether it must be computed.

A rule sees counts and one number (the observed change), never a tensor, so every rule serves at every site.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from operator import mul
from typing import Protocol

from diffeff.methods.caching.curve import Curve, nearest_entries

__all__ = [
    "Action",
    "AtSigmas",
    "Burst",
    "Cap",
    "Codebook",
    "FirstOf",
    "GrowingWindow",
    "Interval",
    "MagnitudeBudget",
    "Mask",
    "Opening",
    "Policy",
    "Quota",
    "Situation",
    "TailGuard",
    "Threshold",
    "Window",
]


class Action(Enum):
    """What to do with a site at one step."""

    COMPUTE = "compute"
    PREDICT = "predict"


@dataclass(frozen=True)
class Situation:
    """What a rule may look at. All counts are entries of the scheduler's timestep list."""

    done: int
    """Entries of this run before the present one."""
    left: int
    """Entries of this run after the present one."""
    since: int
    """Entries since the last computed one, 1 right after it."""
    change: float | None = None
    """What the indicator says has changed since the last computed entry; None where it cannot tell."""
    index: int = 0
    """The present entry of the scheduler's whole list."""
    sigmas: tuple[float, ...] = ()
    """Noise levels of the whole list; empty where the scheduler has none."""
    computed: int = 0
    """Entries of this run that were computed before."""
    left_at_first: int | None = None
    """`left` at the first predicted entry; None before it."""

    @property
    def length(self) -> int:
        """Entries of this run."""
        return self.done + self.left + 1

    @property
    def skipped(self) -> int:
        """Entries predicted in a row so far."""
        return self.since - 1


class Policy(Protocol):
    """A rule."""

    def decide(self, at: Situation) -> Action:
        """Whether the step must be computed. Only asked once there is something to predict from."""


def _unless(must_compute: bool) -> Action:
    return Action.COMPUTE if must_compute else Action.PREDICT


@dataclass(frozen=True)
class Interval:
    """Computes every `every`-th step."""

    every: int

    def decide(self, at: Situation) -> Action:
        return _unless(at.since >= self.every)


@dataclass(frozen=True)
class Threshold:
    """Computes when the change reaches `limit`, or is unknown (nan included). A limit of 0 always computes."""

    limit: float

    def decide(self, at: Situation) -> Action:
        return _unless(at.change is None or not at.change < self.limit)


@dataclass(frozen=True)
class Window:
    """Computes the `first` and the `last` steps of the run."""

    first: int
    last: int

    def decide(self, at: Situation) -> Action:
        return _unless(at.done < self.first or at.left < self.last)


@dataclass(frozen=True)
class Cap:
    """Computes after `most` predicted steps in a row."""

    most: int

    def decide(self, at: Situation) -> Action:
        return _unless(at.skipped >= self.most)


@dataclass(frozen=True)
class FirstOf:
    """Computes as soon as one of its rules does."""

    rules: tuple[Policy, ...]

    def decide(self, at: Situation) -> Action:
        return _unless(any(rule.decide(at) is Action.COMPUTE for rule in self.rules))


# --- published rules ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Opening:
    """Computes the first `share` of the run, to the nearest step."""

    share: float

    def steps(self, length: int) -> int:
        """How many that is."""
        return int(self.share * length + 0.5)

    def decide(self, at: Situation) -> Action:
        return _unless(at.done < self.steps(at.length))


@dataclass(frozen=True)
class Burst:
    """Computes after a share of the run's steps (at least one) was predicted in a row (BWCache's reuse length R)."""

    share: float

    def decide(self, at: Situation) -> Action:
        return _unless(at.skipped >= max(int(self.share * at.length + 0.5), 1))


@dataclass(frozen=True)
class TailGuard:
    """Computes the last steps: the `share` of what was left, it included, at the first predicted one (BWCache)."""

    share: float

    def decide(self, at: Situation) -> Action:
        return _unless(at.left_at_first is not None and at.left + 1 <= self.share * (at.left_at_first + 1))


@dataclass(frozen=True)
class Codebook:
    """The more has changed, the sooner it computes: every `intervals[n]`-th step while the change is below
    `limits[n]`, every step beyond the last limit or where the change is unknown (AdaCache)."""

    limits: tuple[float, ...]
    intervals: tuple[int, ...]

    def decide(self, at: Situation) -> Action:
        if at.change is None or not at.change < self.limits[-1]:
            return Action.COMPUTE
        return _unless(at.since >= self.intervals[bisect_right(self.limits, at.change)])


@dataclass(frozen=True)
class GrowingWindow:
    """After `first` computed steps, computes every n-th, and n grows by `growth` with every one (Spectrum)."""

    first: int
    window: float
    growth: float

    def decide(self, at: Situation) -> Action:
        grown = self.window + self.growth * max(at.computed - self.first, 0)
        return _unless(at.done < self.first or at.since >= max(int(grown + 1e-9), 1))


@dataclass(frozen=True)
class MagnitudeBudget:
    """Computes when the summed error of holding reaches `limit` (MagCache).

    `curve` is the size of what is held by noise level; each step since the last computed one adds how far the size
    has moved from it, |1 - curve(now) / curve(then)|. All of it is known beforehand. A limit of 0 always computes.
    """

    curve: Curve
    limit: float

    def decide(self, at: Situation) -> Action:
        sizes = [self.curve(s) for s in at.sigmas[max(at.index - at.since, 0) : at.index + 1]]
        ratios = accumulate((b / a for a, b in pairwise(sizes)), mul)
        return _unless(not sizes or not sum(abs(1 - ratio) for ratio in ratios) < self.limit)


@dataclass(frozen=True)
class AtSigmas:
    """Computes at the entries next to these noise levels, and nowhere else. Without noise levels, everywhere."""

    levels: tuple[float, ...]

    def decide(self, at: Situation) -> Action:
        begin = at.index - at.done
        found = nearest_entries(self.levels, at.sigmas[begin : begin + at.length])
        return _unless(not at.sigmas or at.done in found)


@dataclass(frozen=True)
class Quota:
    """Computes once `most` steps of the run have been predicted."""

    most: int

    def decide(self, at: Situation) -> Action:
        return _unless(at.done - at.computed >= self.most)


@dataclass(frozen=True)
class Mask:
    """Alternates: `compute[0]` steps computed, up to `skip[0]` predicted, `compute[1]` computed, ... (DBCache's step
    masks). The numbers are stretched to the run's length; the end is computed."""

    compute: tuple[int, ...]
    skip: tuple[int, ...]

    def decide(self, at: Situation) -> Action:
        bins = [n for pair in zip(self.compute, self.skip, strict=True) for n in pair]
        edges = [round(edge * at.length / sum(bins)) for edge in accumulate(bins)]
        return _unless(at.left == 0 or bisect_right(edges, at.done) % 2 == 0)
