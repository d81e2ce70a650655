"""What a tuning run found: candidates with their figures, the best of them, and what that means in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from diffeff.errors import ConfigError
from diffeff.plan import Plan

__all__ = ["Candidate", "Measured", "Point", "Target", "Tuned", "front"]

Kind = Literal["plain", "exact", "steps", "preset", "guidance", "schedule", "solver"]


@dataclass(frozen=True)
class Target:
    """What is wanted: at least so many dB against the plain run, as fast as possible; or at least so fast, as near
    to it as possible. Exactly one of both."""

    min_psnr: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        if (self.min_psnr is None) == (self.min_speedup is None):
            raise ConfigError(
                "give exactly one target: min_psnr (dB against the plain run) or min_speedup (1.0 is plain)"
            )
        if self.min_psnr is not None and not 5 <= self.min_psnr <= 100:
            raise ConfigError(f"min_psnr is {self.min_psnr}; allowed: 5 to 100 dB")
        if self.min_speedup is not None and not 1 <= self.min_speedup <= 100:
            raise ConfigError(f"min_speedup is {self.min_speedup}; allowed: 1 to 100")

    def __str__(self) -> str:
        if self.min_psnr is not None:
            return f"at least {self.min_psnr:g} dB"
        return f"at least {self.min_speedup:g} times as fast"


@dataclass(frozen=True)
class Candidate:
    """One way to run the model: a plan at a number of steps."""

    kind: Kind
    label: str
    plan: Plan
    steps: int


@dataclass(frozen=True)
class Measured:
    """Figures on seeds that nothing was tuned on. Ratios to the plain run of the same prompt, taken in turns.

    `psnr` in dB: mean over runs, its 95 % interval, and the worst. `speedup`: median and its 95 % interval.
    """

    psnr: float
    psnr_low: float
    psnr_high: float
    psnr_worst: float
    speedup: float
    speedup_low: float
    speedup_high: float
    runs: int


@dataclass(frozen=True)
class Point:
    """A candidate with what is known of it: `psnr` on the tuning seeds, the share of the denoiser's work that is
    computed, the speed-up that this should give, and what was measured, where it was."""

    candidate: Candidate
    psnr: float
    share: float
    expected_speedup: float
    measured: Measured | None = None

    @property
    def decibels(self) -> float:
        """The best estimate of its PSNR."""
        return self.psnr if self.measured is None else self.measured.psnr

    @property
    def speedup(self) -> float:
        """The best estimate of its speed-up."""
        return self.expected_speedup if self.measured is None else self.measured.speedup

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        candidate = self.candidate
        return {
            "kind": candidate.kind,
            "label": candidate.label,
            "steps": candidate.steps,
            "plan": candidate.plan.to_dict(),
            "psnr": _finite(self.psnr),
            "share": self.share,
            "expected_speedup": self.expected_speedup,
            "measured": None if self.measured is None else {k: _finite(v) for k, v in asdict(self.measured).items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        candidate = Candidate(data["kind"], data["label"], Plan.from_dict(data["plan"]), data["steps"])
        found = data["measured"]
        values: dict[str, Any] = {} if found is None else {k: _infinite(v) for k, v in found.items()}
        measured = None if found is None else Measured(**values)
        return cls(candidate, _infinite(data["psnr"]), data["share"], data["expected_speedup"], measured)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _infinite(value: float | None) -> float:
    return math.inf if value is None else value


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both speed and PSNR, from slow to fast."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speedup, -p.decibels)):
        if not kept or point.decibels > kept[-1].decibels:
            kept.append(point)
    return kept[::-1]


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`. `plan` is stamped with the model; `steps` is the number of steps to call it with.

    `chosen` is None where the target cannot be met: the plan is then empty, and `message` says what can be reached.
    """

    target: Target
    plan: Plan
    steps: int
    chosen: Point | None
    points: tuple[Point, ...]
    message: str
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.chosen is not None

    @property
    def front(self) -> list[Point]:
        """The Pareto front, from slow to fast."""
        return front(self.points)

    @property
    def fewer_steps(self) -> list[Point]:
        """Plain runs of fewer steps, the curve to beat, from slow to fast."""
        found = [p for p in self.points if p.candidate.kind in ("steps", "plain")]
        return sorted(found, key=lambda p: p.speedup)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        on_front = {id(p) for p in self.front}
        return {
            "target": asdict(self.target),
            "met": self.met,
            "message": self.message,
            "notes": list(self.notes),
            "steps": self.steps,
            "plan": self.plan.to_dict(),
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "points": [p.to_dict() | {"front": id(p) in on_front} for p in self.points],
            "settings": dict(self.settings),
        }

    def __str__(self) -> str:
        return self.message
