"""`tune`: the fastest plan that keeps a fidelity target, or the most faithful one at a speed, found and measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffeff.core.config import Config
from diffeff.errors import MethodInapplicable
from diffeff.methods.guidance.guidance_skip import GuidanceSkip
from diffeff.methods.sampling.fitted_solver import FittedSolver
from diffeff.methods.tokens.unpad_text import UnpadText
from diffeff.plan import ModelStamp, Plan
from diffeff.presets import PRESETS
from diffeff.report import environment
from diffeff.search.bench import Bench
from diffeff.search.choose import corrected
from diffeff.search.points import Candidate, Point, Target, Tuned, front
from diffeff.search.schedule import Schedule
from diffeff.search.schedules import ScheduleSearch
from diffeff.search.sensitivity import sensitivities
from diffeff.search.settings import FAMILIES, Observe, Progress, checked
from diffeff.search.solver import fit
from diffeff.search.trace import Job, Trace, record
from diffeff.search.verdict import verdict
from diffeff.search.work import WorkFile
from diffeff.stamp import stamp_of

__all__ = ["tune"]

log = logging.getLogger("diffeff")

EXACT = (UnpadText(),)
"""Methods that give the plain result, to rounding."""
SAME = 60.0
"""dB from which on a result counts as the same: rounding is no nearer after a run in 16-bit floats."""
MARGIN = 0.8
"""dB that a candidate tuned on the tuning seeds must exceed the target by there: it loses some on others."""


def tune(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    min_psnr: float | None = None,
    min_speedup: float | None = None,
    call: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    families: Sequence[str] = FAMILIES,
    rounds: int = 3,
    swaps: int = 24,
    timed_rounds: int = 1,
    work: str | Path | None = None,
    observe: Observe = lambda done, what: None,
) -> Tuned:
    """Find the plan that meets a target on your model, and measure it.

    `pipe` is a DiffEffPipeline; its own plan is put back afterwards. `prompts` (four are enough; class labels for a
    class-conditional model) run at `seeds` (0, 1, ... unless given) with the pipeline arguments in `call`, whose
    `num_inference_steps` are the plain run's. `families` are what the search may combine: fewer steps, presets,
    skipped guidance, scheduled caches, fitted solvers. `rounds` of Gauss-Newton and trials of `swaps` bound the
    corrections of a schedule on real runs. `work` is a file in which results are kept, so that the same call goes on
    where one was interrupted.

    Candidates are tried on the tuning seeds; what meets the target there is measured against the plain run on other
    seeds, in turns, and only these figures count. Takes about 25 plain runs of all prompts.

    Raises ConfigError for impossible settings, MethodInapplicable for few-step models, and whatever the pipeline
    raises. A target that cannot be met is no error: see `Tuned.met` and `Tuned.message`.
    """
    target = Target(min_psnr, min_speedup)
    settings = checked(pipe, prompts, call or {}, seeds, families)
    before = pipe.plan
    pipe.remove()
    try:
        stamp = stamp_of(pipe.wrapped, pipe.denoisers)
        subject = {"stamp": vars(stamp), "environment": environment(), "rounds": rounds, "swaps": swaps} | settings
        tuner = _Tuner(pipe, target, settings, stamp, WorkFile(None if work is None else Path(work), subject))
        tuner.rounds, tuner.swaps, tuner.timed_rounds = rounds, swaps, timed_rounds
        tuner.progress = Progress(observe, 30.0)
        found = tuner.run()
        observe(1.0, "done")
        return found
    finally:
        pipe.apply(before) if before.methods else pipe.remove()


@dataclass
class _Tuner:
    """One search."""

    pipe: Any
    target: Target
    settings: Mapping[str, Any]
    stamp: ModelStamp
    work: WorkFile
    rounds: int = 3
    swaps: int = 24
    timed_rounds: int = 1
    progress: Progress = field(default_factory=lambda: Progress(lambda done, what: None, 1.0))
    points: dict[str, Point] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def bench(self) -> Bench:
        s = self.settings
        return Bench(self.pipe, s["prompts"], s["seeds"], s["call"], s["argument"], exact=EXACT)

    @property
    def steps(self) -> int:
        return int(self.settings["call"]["num_inference_steps"])

    @cached_property
    def job(self) -> Job:
        s = self.settings
        return Job(tuple(s["prompts"]), tuple(s["seeds"]), s["call"], self.bench.beside)

    @cached_property
    def trace(self) -> Trace:
        self.progress.part(1, "record a plain run")
        return record(self.pipe, self.job)

    @cached_property
    def search(self) -> ScheduleSearch:
        trace, kept = self.trace, self.work.get("sensitivity")
        if kept is None:
            part = self.progress.part(2.5, "how errors grow along the run")
            kept = sensitivities(self.pipe, self.job, trace, 4, observe=part).tolist()
            self.work.put(kept, "sensitivity")
        import numpy as np

        return ScheduleSearch.of(trace, np.array(kept), provenance=self._provenance())

    def _provenance(self) -> dict[str, Any]:
        s = self.settings
        return {
            "model": {k: v for k, v in vars(self.stamp).items() if v is not None},
            "prompts": len(s["prompts"]),
            "seeds": s["seeds"],
            "steps": self.steps,
        }

    # --- the search ---------------------------------------------------------------------------------------------
    def run(self) -> Tuned:
        families = self.settings["families"]
        self.progress.part(1, "plain run")
        self.bench.plain()
        for name, search in (
            ("exact", self._exact),
            ("steps", self._fewer_steps),
            ("preset", self._presets),
            ("guidance", self._guidance),
            ("schedule", self._schedules),
            ("solver", self._solvers),
        ):
            if name in families:
                self._guarded(name, search)
        return self._result(self._measure())

    def _guarded(self, name: str, search: Callable[[], None]) -> None:
        """A family that this model or pipeline cannot have is a note, not the end of the search."""
        try:
            search()
        except MethodInapplicable as error:
            log.info("tune: no %s candidates: %s", name, error)
            self.notes.append(f"no {name} candidates: {error}")

    def _try(self, candidate: Candidate, what: str = "") -> Point:
        """The candidate on the tuning seeds, or what the work file knows of it."""
        words = ("try", candidate.plan.digest, candidate.steps)
        kept = self.work.get(*words)
        if kept is None:
            self.progress.part(0.35, what or f"try {candidate.label}")
            point = self.bench.try_out(candidate)
            self.work.put(point.to_dict(), *words)
        else:
            point = Point.from_dict(kept)
        self.points[candidate.label] = point
        log.debug("tune: %s: %.2f dB, %.3f of the work", candidate.label, point.psnr, point.share)
        return point

    def _good(self, point: Point, margin: float = 0.0) -> bool:
        """Whether it meets the target as far as is known before it is timed."""
        if self.target.min_psnr is not None:
            return point.psnr >= self.target.min_psnr + margin
        return point.expected_speedup >= float(self.target.min_speedup or 1.0) * 1.02

    def _plan(self, *configs: Config) -> Plan:
        """These methods, and the exact ones that every candidate carries."""
        return Plan([*self.bench.beside, *configs])

    # --- families -----------------------------------------------------------------------------------------------
    def _exact(self) -> None:
        """Methods that change nothing but the time: all that follows is searched for with them on."""
        for config in EXACT:
            for denoiser in self.pipe.denoisers:
                config.build().inspect(denoiser)
            point = self._try(Candidate("exact", config.name, Plan([config]), self.steps))
            if point.psnr < SAME:
                self.notes.append(f"{config.name} is left out: {point.psnr:.1f} dB are not exact on this model")
            else:
                self.bench.beside = (*self.bench.beside, config)

    def _fewer_steps(self) -> None:
        total = self.steps
        ladder = sorted({max(2, round(total * share)) for share in (0.1, 0.16, 0.25, 0.36, 0.5, 0.7)} - {total})
        for steps in ladder:
            self._steps(steps)
        low, high = 1, total
        for steps in ladder:
            good = self._good(self.points[f"{steps} steps"])
            fine = good if self.target.min_psnr is not None else not good
            low, high = (low, min(high, steps)) if fine else (max(low, steps), high)
        while high - low > 1:
            middle = (low + high) // 2
            good = self._good(self._steps(middle))
            fine = good if self.target.min_psnr is not None else not good
            low, high = (low, middle) if fine else (middle, high)
        if self.bench.beside:
            best = high if self.target.min_psnr is not None else low
            self._try(Candidate("exact", f"{best} steps, {self._beside_words()}", self._plan(), best))

    def _beside_words(self) -> str:
        return " and ".join(config.name for config in self.bench.beside)

    def _steps(self, steps: int) -> Point:
        return self._try(Candidate("steps", f"{steps} steps", Plan(), steps))

    def _presets(self) -> None:
        for name, preset in PRESETS.items():
            if preset.methods:
                self._try(Candidate("preset", name, self._plan(*Plan.preset(name).methods), self.steps))

    def _guidance(self) -> None:
        if not self.trace.guided:
            raise MethodInapplicable("this call has no unconditional branch to skip")
        for interval in (2, 4):
            config = GuidanceSkip(interval=interval, first=2, last=1)
            self._try(Candidate("guidance", f"guidance every {interval} steps", self._plan(config), self.steps))

    def _schedules(self) -> None:
        """Bisect for the fewest rows that meet the target before any correction; corrected ones need fewer."""
        branches = 2 if self.search.guidance is not None else 1
        low, high = branches, branches * (self.steps - 1)
        psnr = self.target.min_psnr is not None
        while high - low > 1:  # of the two, one meets the target: high meets a PSNR, low a speed
            middle = min(max(round((low * high) ** 0.5), low + 1), high - 1)
            good = self._good(self._schedule(middle))
            low, high = (low, middle) if good == psnr else (middle, high)
        if psnr:
            self._walk(max(branches + 1, round(0.85 * high)), branches)
        else:
            for rows in {low, max(low - 1, branches)}:
                self._corrected(rows)
        self._curve(low, branches)

    def _walk(self, rows: int, branches: int) -> None:
        """Corrected schedules of one row less while they meet the target, or one more until they do; and one more,
        for what may be lost on fresh seeds."""
        good = self._good(self._corrected(rows), MARGIN)
        for _ in range(4):
            rows += -1 if good else 1
            if not branches < rows < branches * self.steps:
                break
            if self._good(self._corrected(rows), MARGIN) != good:
                break
        if not good and rows + 1 < branches * self.steps:
            self._corrected(rows + 1)

    def _curve(self, near: int, branches: int) -> None:
        """A few more points for the front, away from the target."""
        for share in (0.5, 0.7, 1.4, 2.0):
            rows = round(near * share)
            if branches + 1 < rows < branches * self.steps * 0.75:
                self._schedule(rows)

    def _schedule(self, rows: int) -> Point:
        return self._play(self.search.schedule(rows), f"schedule of {rows} calls")

    def _play(self, schedule: Schedule, label: str) -> Point:
        return self._try(Candidate("schedule", label, self._plan(schedule.config()), self.steps))

    def _corrected(self, rows: int) -> Point:
        """The schedule of so many rows after rounds on its own trajectory and local swaps."""
        label = f"schedule of {rows} calls, corrected"
        kept = self.work.get("corrected", rows)
        if kept is None:
            kept = self._correct(rows, label).to_dict()
            self.work.put(kept, "corrected", rows)
        return self._play(Schedule.from_dict(kept), label)

    def _correct(self, rows: int, label: str) -> Schedule:
        """Steps chosen on real runs, weights fitted to their end."""
        stages = {"steps": 0.05 * self.swaps, "weights": 0.3 * rows * self.rounds / 3}
        parts: dict[str, Callable[[float], None]] = {}

        def observe(done: float, what: str) -> None:
            if what not in parts:
                parts[what] = self.progress.part(stages[what], f"{label}: {what}")
            parts[what](done)

        options: dict[str, Any] = {"rounds": self.rounds, "swaps": self.swaps, "observe": observe}
        found = corrected(self.pipe, self.job, self.trace, self.search, rows, **options)
        log.info("tune: %s ends %.4f from the plain run", label, found.expected)
        return found

    def _solvers(self) -> None:
        """Fitted solvers that should be faster than the best found so far: bisect for the fastest that meets the
        target, or the two most faithful ones that are fast enough."""
        options = [o for o in self._options() if self._gain(*o) > self._fastest()]
        if self.target.min_psnr is None:
            for option in options[-2:]:
                self._solver(*option)
            return
        low, high = -1, len(options)
        while high - low > 1:
            middle = (low + high) // 2
            good = self._good(self._solver(*options[middle]), MARGIN / 2)
            low, high = (low, middle) if good else (middle, high)

    def _options(self) -> list[tuple[int, int]]:
        """Evaluations, and how many of them are guided: one per number of branches, the cheapest first."""
        if not self.trace.guided:
            return [(k, k) for k in range(2, 8)]
        return [(rows - guided, guided) for rows in range(3, 11) for guided in [max(1, round(0.35 * rows))]]

    def _gain(self, evaluations: int, guided: int) -> float:
        branches = evaluations + guided if self.trace.guided else evaluations
        return self.bench.gain(branches, evaluations, self.bench.beside)

    def _fastest(self) -> float:
        """The speed-up a solver has to exceed to be of use."""
        if self.target.min_speedup is not None:
            return self.target.min_speedup
        return max((p.expected_speedup for p in self.points.values() if self._good(p)), default=1.0)

    def _solver(self, evaluations: int, guided: int) -> Point:
        label = f"fitted solver of {evaluations} steps"
        label += f", {guided} of them guided" if self.trace.guided and guided < evaluations else ""
        kept = self.work.get("solver", evaluations, guided)
        if kept is None:
            spread = tuple(sorted({round(i * evaluations / guided) for i in range(guided)}))
            part = self.progress.part(3.0, label)
            options: dict[str, Any] = {"rounds": 3, "trace": self.trace, "observe": lambda done, what: part(done)}
            found = fit(self.pipe, self.job, evaluations, spread, **options)
            kept = found.config.to_dict()
            self.work.put(kept, "solver", evaluations, guided)
        return self._try(Candidate("solver", label, self._plan(FittedSolver.from_dict(kept)), self.steps))

    # --- measuring ----------------------------------------------------------------------------------------------
    def _measure(self) -> Point | None:
        """Time the best candidates, and the next ones while these fall short on fresh seeds or promise more."""
        waiting = self._ranked()
        chosen: Point | None = None
        for _ in range(3):
            batch, waiting = self._next(waiting)
            if not batch:
                break
            for point in self._timed(batch):
                self.points[point.candidate.label] = point
            chosen = self._best()
            if chosen is not None and not any(self._promises(point, chosen) for point in waiting):
                break
        return chosen

    def _promises(self, point: Point, chosen: Point) -> bool:
        """Whether a candidate that was not timed is expected to be better than the best one that was."""
        if self.target.min_psnr is not None:
            return point.expected_speedup > 1.02 * chosen.speedup
        return point.psnr > chosen.decibels

    def _ranked(self) -> list[Point]:
        """Candidates that meet the target as far as is known, the best first."""
        good = [p for p in self.points.values() if self._good(p) and p.share < 0.97]
        if self.target.min_psnr is not None:
            return sorted(good, key=lambda p: -p.expected_speedup)
        return sorted(good, key=lambda p: -p.psnr)

    def _next(self, waiting: list[Point]) -> tuple[list[Point], list[Point]]:
        """The best two, and the best of fewer steps beside them."""
        batch = waiting[:2]
        steps = next((p for p in waiting[2:] if p.candidate.kind == "steps"), None)
        if steps is not None and not any(p.candidate.kind == "steps" for p in batch):
            batch = [*batch, steps]
        return batch, [p for p in waiting if p not in batch]

    def _timed(self, points: list[Point]) -> list[Point]:
        words = ("measured", self.timed_rounds, [(p.candidate.plan.digest, p.candidate.steps) for p in points])
        kept = self.work.get(*words)
        if kept is None:
            part = self.progress.part(2.5, "measure on fresh seeds, in turns with plain")
            found = self.bench.measure(points, self.timed_rounds, part)
            self.work.put([p.to_dict() for p in found], *words)
            return found
        return [Point.from_dict(entry) for entry in kept]

    def _best(self) -> Point | None:
        measured = [p for p in self.points.values() if p.measured is not None and p.speedup > 1]
        if self.target.min_psnr is not None:
            good = [p for p in measured if p.decibels >= self.target.min_psnr]
            return max(good, key=lambda p: p.speedup, default=None)
        good = [p for p in measured if p.speedup >= float(self.target.min_speedup or 1.0)]
        return max(good, key=lambda p: p.decibels, default=None)

    # --- the result ---------------------------------------------------------------------------------------------
    def _result(self, chosen: Point | None) -> Tuned:
        plain = Point(Candidate("plain", "plain", Plan(), self.steps), float("inf"), 1.0, 1.0)
        points = (plain, *self.points.values())
        plan, steps = (Plan(), self.steps) if chosen is None else (chosen.candidate.plan, chosen.candidate.steps)
        stamp = ModelStamp(self.stamp.family, self.stamp.fingerprint, self.stamp.scheduler, steps)
        settings = {**self.settings, "environment": environment()}
        words = verdict(self.target, chosen, front(points), self.points.values())
        return Tuned(self.target, plan.stamped(stamp), steps, chosen, points, words, tuple(self.notes), settings)
