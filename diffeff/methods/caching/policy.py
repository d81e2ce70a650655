"""When to compute: frozen rules that combine, each saying for one step whether it must be computed.

A rule sees counts and one number (the observed change), never a tensor, so every rule serves at every site.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

__all__ = ["Action", "Cap", "FirstOf", "Interval", "Policy", "Situation", "Threshold", "Window"]


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
