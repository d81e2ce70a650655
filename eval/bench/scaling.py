"""How time and memory of a model grow with tokens, frames, steps and batch: points, and log-log slopes.

Protocol: every point of an axis runs once untimed. Then the points take turns in one process, in reversed order every
other round, so that a machine that slows down does not bend the line; a time is the median of its rounds. Peak memory
comes from one more call per point, on the CPU in a process of its own. Calls end at the latents where the pipeline can,
without decoding. A point that cannot run is left out, and its row says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch

from diffeff.errors import ConfigError, DiffEffError, UnknownName, UnsupportedModel, nearest
from diffeff.eval.bench.axes import AXES, Point, Subject, subject_of, tokens_of
from diffeff.eval.bench.point import fresh_memory, memory_here
from diffeff.eval.bench.rows import quartiles
from diffeff.eval.bench.slope import MIN_POINTS, fit_slope
from diffeff.eval.bench.stamp import run_stamp
from diffeff.kernels.microbench import machine
from diffeff.plan import Plan
from diffeff.report import environment

__all__ = ["AXES", "UNITS", "ScalingSettings", "measure_scaling"]

UNITS: Mapping[str, str] = {
    "tokens": "image tokens of all frames",
    "frames": "frames of the latents",
    "steps": "denoising steps",
    "batch": "prompts per call",
}
"""What `x` counts on each axis."""
_SCALARS = (str, int, float, bool, type(None))
Observe = Callable[[int, int, str], None]
"""Called with runs done, runs in all, and what comes next."""


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """What to vary. `model`: a bundled model, `tiny:NAME`, a folder or a hub id. `axes`: some of AXES; empty means all
    that the model has. `points`: values per axis in place of the defaults, at least 3 different ones: (height, width)
    for tokens, integers for the others; pixels and frames of the call, for tiny models those of the latents. `call`:
    arguments over the recommended ones. `memory`: in a fresh process per point, in this one, or not at all."""

    model: str = "sprites-wan"
    axes: tuple[str, ...] = ()
    points: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    plan: Plan | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 3
    seed: int = 0
    memory: Literal["fresh", "here", "off"] = "fresh"
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for axis in (*self.axes, *self.points):
            if axis not in AXES:
                raise UnknownName(f"there is no axis {axis!r} to scale along. {nearest(axis, AXES)}")
        for axis, values in self.points.items():
            _check_points(axis, values)
        if self.repeats < 1:
            raise ConfigError(f"repeats is {self.repeats}; allowed: 1 <= int")
        if self.memory not in ("fresh", "here", "off"):
            raise ConfigError(f"memory is {self.memory!r}; allowed: one of fresh, here, off")


def _check_points(axis: str, values: Sequence[Any]) -> None:
    for value in values:
        numbers = value if axis == "tokens" and isinstance(value, tuple) and len(value) == 2 else (value,)
        if (axis == "tokens") != (len(numbers) == 2) or not all(isinstance(n, int) and n > 0 for n in numbers):
            wanted = "(height, width), two integers above 0" if axis == "tokens" else "an integer above 0"
            raise ConfigError(f"a point of {axis} is {value!r}; allowed: {wanted}")
    if len(set(values)) < MIN_POINTS:
        raise ConfigError(f"{axis} has the points {list(values)}; a slope needs at least {MIN_POINTS} different ones")


def measure_scaling(
    settings: ScalingSettings, observe: Observe = lambda done, total, label: None, *, pipe: Any = None
) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per axis, as soon as it is measured.

    `pipe` is a loaded pipeline to use in place of loading `settings.model`, which then only names it; its memory is
    measured in this process. A plan on it is taken off, and put back at the end.

    Raises what loading and applying the plan raise, and ConfigError for an axis the model has not or points that are
    too few; points that fail in running are listed in the row, and a slope with fewer than 3 points left is null.
    """
    subject = subject_of(settings.model, settings.call, settings.device, settings.dtype, pipe)
    before = subject.pipe.plan
    plan = [_Axis(settings, subject, axis, pipe is None) for axis in _chosen(settings, subject)]
    total, done, stamp = sum(axis.runs for axis in plan), 0, run_stamp()

    def count(label: str) -> None:
        nonlocal done
        observe(min(done, total), total, label)
        done += 1

    try:
        for axis in plan:
            yield axis.row(count) | stamp
        observe(total, total, "")
    finally:
        subject.pipe.apply(before) if before.methods else subject.pipe.remove()


def _chosen(settings: ScalingSettings, subject: Subject) -> tuple[str, ...]:
    """The axes to measure: all of the model's that have enough points, or those that were asked for."""
    has, name = subject.axes(), settings.model
    for axis in (*settings.axes, *settings.points):
        if axis not in has:
            raise ConfigError(f"{name} has no axis {axis!r} to scale along; it has {', '.join(has)}")
    return settings.axes or has


class _Axis:
    """One axis of one model: its points, and what was measured at each."""

    def __init__(self, settings: ScalingSettings, subject: Subject, axis: str, loaded_here: bool) -> None:
        self.settings, self.subject, self.axis = settings, subject, axis
        values = settings.points.get(axis) or subject.defaults(axis)
        _check_points(axis, values)
        self.points = [Point(axis, value) for value in sorted(set(values))]
        self.device = torch.device(subject.pipe.wrapped._execution_device)
        sendable = all(isinstance(value, _SCALARS) for value in settings.call.values())
        self.fresh = settings.memory == "fresh" and loaded_here and sendable and self.device.type != "cuda"
        self.failed: list[dict[str, Any]] = []
        self.unit = UNITS[axis]

    @property
    def runs(self) -> int:
        return len(self.points) * (1 + self.settings.repeats + (self.settings.memory != "off"))

    def row(self, count: Callable[[str], None]) -> dict[str, Any]:
        """Everything about this axis. `count` is called before each run."""
        settings, pipe = self.settings, self.subject.pipe
        pipe.remove()
        x = self._positions()
        if settings.plan is not None:
            pipe.apply(settings.plan)
        alive = [point for point in self.points if self._warmed(point, point in x, count)]
        times: dict[Point, list[tuple[float, float]]] = {point: [] for point in alive}
        for number in range(settings.repeats):
            for point in reversed(alive) if number % 2 else alive:
                count(f"{self._label(point)}, round {number + 1}")
                times[point].append(self._timed(point))
        return self._row([self._entry(p, x[p], times[p]) | self._memory(p, count) for p in alive])

    def _row(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        settings = self.settings
        return {
            "benchmark": "scaling",
            "version": 1,
            "model": settings.model,
            "axis": self.axis,
            "unit": self.unit,
            "points": entries,
            "slope_time": _slope(entries, "seconds"),
            "slope_cpu_time": _slope(entries, "cpu_seconds"),
            "slope_memory": _slope(entries, "above_load_bytes"),
            "failed": self.failed,
            "plan": None if settings.plan is None else settings.plan.to_dict(),
            "call": {k: v if isinstance(v, _SCALARS) else type(v).__name__ for k, v in settings.call.items()},
            "repeats": settings.repeats,
            "seed": settings.seed,
            "device": str(self.device),
            "dtype": str(self.subject.pipe.wrapped.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "machine": machine(self.device),
            "environment": environment(),
        }

    # --- one point ----------------------------------------------------------------------------------------------------
    def _positions(self) -> dict[Point, float]:
        """`x` of every point that can be told. Tokens are counted in the model itself; pixels stand in for them in an
        unknown architecture."""
        found = {}
        for point in self.points:
            try:
                x = self.subject.x(point)
                found[point] = self._tokens(point) if x is None else x
            except UnsupportedModel:
                self.unit = "pixels of a frame"
                return {p: float(p.value[0] * p.value[1]) for p in self.points}
            except Exception as error:  # too long for a position table, refused: a fact about the point
                self._fail(point, error)
        return found

    def _tokens(self, point: Point) -> float:
        return tokens_of(self.subject.pipe, self.subject.call(point, self.settings.seed))

    def _warmed(self, point: Point, known: bool, count: Callable[[str], None]) -> bool:
        """The untimed first run; False when the point cannot run."""
        count(f"{self._label(point)}, warm-up")
        try:
            if known:
                self._timed(point)
        except Exception as error:  # out of memory, refused by the plan at this setting: a fact about the point
            self._fail(point, error)
            known = False
        for _ in range(0 if known else self.runs // len(self.points) - 1):
            count(f"{self._label(point)} failed")
        return known

    def _fail(self, point: Point, error: Exception) -> None:
        kind = "" if isinstance(error, DiffEffError) else f"{type(error).__name__}: "
        self.failed.append({"value": _plain(point.value), "error": kind + str(error)})

    def _timed(self, point: Point) -> tuple[float, float]:
        """Wall and process-CPU seconds of one call; what makes its inputs is not part of them."""
        call = self.subject.call(point, self.settings.seed)
        self._wait()
        start, start_cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            self.subject.pipe(**call)
        self._wait()
        return time.perf_counter() - start, time.process_time() - start_cpu

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _entry(self, point: Point, x: float, times: Sequence[tuple[float, float]]) -> dict[str, Any]:
        wall = [seconds for seconds, _ in times]
        return {
            "x": x,
            "value": _plain(point.value),
            "seconds": round(median(wall), 6),
            "spread": quartiles(wall),
            "cpu_seconds": round(median(seconds for _, seconds in times), 6),
        }

    def _memory(self, point: Point, count: Callable[[str], None]) -> dict[str, Any]:
        """Peak bytes of the process, and beyond what it held before the call; nulls where they are not measured."""
        if self.settings.memory == "off":
            return {"peak_bytes": None, "above_load_bytes": None, "memory_how": None}
        count(f"{self._label(point)}, memory")
        if self.fresh:
            found = fresh_memory(self._request(point))
        else:
            found = memory_here(self.subject, point, self.settings.seed, self.device)
        names = {"peak_bytes": "bytes", "above_load_bytes": "above_load_bytes", "memory_how": "how"}
        return {name: found[key] for name, key in names.items()}

    def _request(self, point: Point) -> dict[str, Any]:
        settings, plan = self.settings, self.settings.plan
        return {
            **{name: getattr(settings, name) for name in ("model", "device", "dtype", "seed")},
            "call": dict(settings.call),
            "threads": torch.get_num_threads(),
            "plan": None if plan is None else plan.to_dict(),
            "folder": None if plan is None or plan.folder is None else str(plan.folder),
            "axis": self.axis,
            "value": point.value,
        }

    def _label(self, point: Point) -> str:
        shown = "x".join(map(str, point.value)) if self.axis == "tokens" else point.value
        return f"{self.axis} {shown}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _slope(entries: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """The slope of a column over `x`; None with fewer than 3 points that have a value above zero."""
    rows = [(entry["x"], entry[name]) for entry in entries if entry[name] is not None and entry[name] > 0]
    if len({x for x, _ in rows}) < MIN_POINTS:
        return None
    return fit_slope([x for x, _ in rows], [y for _, y in rows]).to_dict()
