"""Plain against accelerated at one prompt and seed: time, fidelity, adherence; plain with fewer steps, too.

Protocol: every arm runs untimed first (warm-up, and the frames), then the arms take turns in one process, in
reversed order every other round. A speed-up is the median over rounds of that round's ratio to plain, with its spread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffeff.eval.metrics.fidelity import max_abs, psnr
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import Report

if TYPE_CHECKING:
    from diffeff.zoo.world import Scene

__all__ = ["Arm", "Comparison", "Spread", "adherence_of", "compare", "fewer_steps"]

Frames = NDArray[np.float32]
Generate = Callable[[DiffEffPipeline, int, str], Frames]
"""Runs the pipeline at a number of steps, always with one seed; returns float frames `[F, H, W, 3]` in [0, 1].
The last argument is the arm's name (plain, accelerated, fewer), for showing progress."""


@dataclass(frozen=True)
class Spread:
    """Median of some measurements with their smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Arm:
    """One way to make the clip. `psnr` (dB) and `max_abs` are against plain; inf and 0 when identical.

    `adherence` says per attribute of the caption whether it is right; None when that cannot be measured.
    """

    name: str
    steps: int
    seconds: Spread
    speedup: Spread
    psnr: float
    max_abs: float
    adherence: Mapping[str, bool] | None
    frames: Frames = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a PSNR that is no number is null: see `identical`."""
        return {
            "name": self.name,
            "steps": self.steps,
            "seconds": vars(self.seconds),
            "speedup": vars(self.speedup),
            "psnr": self.psnr if math.isfinite(self.psnr) else None,
            "max_abs": self.max_abs,
            "identical": self.max_abs == 0,
            "adherence": None if self.adherence is None else dict(self.adherence),
        }


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. `report` is what the accelerated pipeline said of its last run."""

    plan: Plan
    rounds: int
    plain: Arm
    accelerated: Arm
    fewer: Arm | None
    """Plain with as many steps as cost about what the accelerated run costs; None when none does."""
    report: Report
    notes: tuple[str, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in (self.plain, self.accelerated, self.fewer) if arm is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: dicts, lists and scalars only, no frames."""
        return {
            "plan": self.plan.to_dict(),
            "rounds": self.rounds,
            "arms": [arm.to_dict() for arm in self.arms],
            "notes": list(self.notes),
            "report": self.report.to_dict(),
        }

    def to_markdown(self) -> str:
        """A table of the arms, what the plan did, and how far the figures reach."""
        seen = list(self.plain.adherence or {})
        head = ["", "steps", "seconds", "speed-up", "PSNR to plain", "max abs difference", *seen]
        rows = [_row([_title(arm, self.plan), *_figures(arm), *_words(arm, seen)]) for arm in self.arms]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join(
            [_row(head), _row(["---"] * len(head)), *rows, "", *notes, "", "#" + self.report.to_markdown()]
        )


def compare(
    pipe: DiffEffPipeline,
    plan: Plan,
    generate: Generate,
    steps: int,
    *,
    rounds: int = 3,
    scene: Scene | None = None,
    observe: Callable[[str, Frames], None] = lambda name, frames: None,
) -> Comparison:
    """Measure what `plan` buys and costs on `pipe`, against plain and against simply using fewer steps.

    `observe(name, frames)` is called when the frames of an arm (plain, accelerated, fewer) exist. The pipeline
    has its own plan back afterwards, whatever happens. Costs about `3 * (rounds + 1) + 2` runs.
    Raises what `apply` raises, and ValueError for `rounds < 1`.
    """
    if rounds < 1:
        raise ValueError(f"compare needs rounds >= 1, got {rounds}")
    before = pipe.plan
    bench = _Bench(pipe, plan, generate, observe)
    try:
        bench.warm_up(steps)
        for number in range(rounds):
            bench.round(backwards=number % 2 == 1)
        return bench.result(rounds, scene)
    finally:
        pipe.apply(before) if before.methods else pipe.remove()


class _Bench:
    """The arms of one comparison and their times so far."""

    def __init__(self, pipe: DiffEffPipeline, plan: Plan, generate: Generate, observe: Callable[[str, Frames], None]):
        self.pipe, self.plan, self.generate, self.observe = pipe, plan, generate, observe
        self.steps: dict[str, int] = {}
        self.frames: dict[str, Frames] = {}
        self.times: dict[str, list[float]] = {}
        self.report: Report | None = None

    def warm_up(self, steps: int) -> None:
        """Untimed runs of each arm; how long the second ones took chooses the number of steps of the last arm."""
        for name in ("plain", "accelerated"):
            self.first(name, steps)
        took = {name: self.run(name) for name in ("plain", "accelerated")}
        stages = self.report.seconds if self.report is not None else {}
        fixed = stages.get("encode", 0.0) + stages.get("decode", 0.0)
        fewer = fewer_steps(steps, took["plain"], took["accelerated"], fixed)
        if fewer is not None:
            self.first("fewer", fewer)

    def first(self, name: str, steps: int) -> None:
        self.steps[name], self.times[name] = steps, []
        self.run(name)
        self.observe(name, self.frames[name])

    def round(self, backwards: bool) -> None:
        for name in sorted(self.steps, key=list(self.steps).index, reverse=backwards):
            self.times[name].append(self.run(name))

    def run(self, name: str) -> float:
        """Seconds of one call. Putting the plan on or taking it off is not part of them."""
        if name == "accelerated":
            self.pipe.apply(self.plan)
        else:
            self.pipe.remove()
        start = time.perf_counter()
        frames = self.generate(self.pipe, self.steps[name], name)
        seconds = time.perf_counter() - start
        self.frames.setdefault(name, frames)
        if name == "accelerated":
            self.report = self.pipe.report
        return seconds

    def arm(self, name: str, scene: Scene | None) -> Arm:
        plain, frames, times = self.frames["plain"], self.frames[name], self.times[name]
        ratios = [a / b for a, b in zip(self.times["plain"], times, strict=True)]
        fidelity = psnr(plain, frames), max_abs(plain, frames)
        return Arm(
            name,
            self.steps[name],
            Spread.of(times),
            Spread.of(ratios),
            *fidelity,
            adherence_of(scene, frames),
            frames,
        )

    def result(self, rounds: int, scene: Scene | None) -> Comparison:
        arms = {name: self.arm(name, scene) for name in self.steps}
        fewer = arms.get("fewer")
        if self.report is None:
            raise RuntimeError("the accelerated arm has not run")
        notes = _notes(arms["accelerated"], fewer, scene)
        return Comparison(self.plan, rounds, arms["plain"], arms["accelerated"], fewer, self.report, notes)


def fewer_steps(steps: int, plain: float, accelerated: float, fixed: float) -> int | None:
    """The number of plain steps that costs what the accelerated run costs; None when that is all of them.

    Seconds in; `fixed` is what does not grow with the steps (encoding and decoding).
    """
    share = (accelerated - fixed) / max(plain - fixed, 1e-9)
    count = max(1, round(steps * share))
    return count if count < steps else None


def adherence_of(scene: Scene | None, frames: Frames) -> dict[str, bool] | None:
    """Per attribute of `scene` whether the frames show it, read from their pixels; None without a scene."""
    if scene is None:
        return None
    import torch

    from diffeff.zoo.measure import adherence, measure

    return adherence(scene, measure(torch.from_numpy(frames).permute(0, 3, 1, 2)))


def _notes(accelerated: Arm, fewer: Arm | None, scene: Scene | None) -> tuple[str, ...]:
    notes = ["one prompt and one seed: an example, not a benchmark"]
    if scene is None:
        notes.append("adherence is not measurable here: it needs a bundled sprites model and a caption of its world")
    if fewer is None:
        notes.append("no smaller number of plain steps costs as little: the plan saved too little time")
    elif fewer.psnr > accelerated.psnr:
        notes.append(
            f"plain with {fewer.steps} steps is closer to the full run ({fewer.psnr:.1f} dB) than the plan "
            f"({accelerated.psnr:.1f} dB) at about the same cost: here, fewer steps are the better choice"
        )
    return tuple(notes)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _title(arm: Arm, plan: Plan) -> str:
    return {"accelerated": f"plan {plan.digest}", "fewer": "plain, fewer steps"}.get(arm.name, arm.name)


def _figures(arm: Arm) -> list[str]:
    fidelity = "identical" if arm.max_abs == 0 else f"{arm.psnr:.1f} dB"
    speed = "reference" if arm.name == "plain" else f"{arm.speedup} x"
    return [str(arm.steps), str(arm.seconds), speed, fidelity, f"{arm.max_abs:.3f}"]


def _words(arm: Arm, attributes: list[str]) -> list[str]:
    return ["right" if (arm.adherence or {}).get(name) else "**wrong**" for name in attributes]
