"""Every method on every family at tiny size: works, refused with reason, idle, or fails.

Protocol: a tiny pipeline with random weights runs plain; then each column's plan is applied, runs twice from the same
noise (the second run counts operations), and is removed, after which plain has to come out again bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from diffeff.core.config import knobs
from diffeff.errors import (
    ConfigError,
    DiffEffError,
    MethodInapplicable,
    PlanConflict,
    UnknownName,
    UnsupportedModel,
    nearest,
)
from diffeff.eval.bench.flops import counting_flops
from diffeff.eval.bench.stamp import run_stamp
from diffeff.methods.table import TABLE, config_class
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.report import environment
from diffeff.zoo.tiny import FAMILIES, SMALL, make, run, tiny

__all__ = ["STATUSES", "MatrixSettings", "columns", "measure_matrix"]

STATUSES = ("works", "idle", "refused", "fails")
"""works: engaged, and the result is another or less was computed. idle: attached, and nothing came of it. refused: the
plan was turned down with a reason. fails: all else: an error, a result that is not finite, a trace left behind."""

Observe = Callable[[int, int, str], None]
"""Called with cells done, cells in all, and the cell that comes next."""
_REFUSALS = (ConfigError, MethodInapplicable, PlanConflict, UnsupportedModel)


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """What to try. `families` are names of `zoo.tiny.FAMILIES`, `methods` names of `columns()`; empty means all.
    `pairs` adds every pair of the methods as a column `a + b`."""

    families: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    pairs: bool = False
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.families:
            tiny(name)
        for name in self.methods:
            if name not in columns():
                raise UnknownName(f"the matrix has no column {name!r}. {nearest(name, columns())}")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; allowed: 1 <= int")

    def plans(self) -> dict[str, Plan]:
        """The plan of every column."""
        single = {name: columns()[name] for name in self.methods or columns()}
        both = combinations(single, 2) if self.pairs else ()
        return single | {f"{a} + {b}": Plan([*single[a].methods, *single[b].methods]) for a, b in both}


@cache
def columns() -> dict[str, Plan]:
    """A plan per method, with options at which it acts on tiny models; a method that can act at several sites has a
    column `method:site` for each but its default."""
    found = {}
    for name in TABLE:
        small = SMALL.get(name, {})
        found[name] = _plan(name, small)
        for spec in knobs(config_class(name)):
            if spec.name == "site":
                others = [site for site in spec.choices if site != spec.default]
                found |= {f"{name}:{site}": _plan(name, {**small, "site": site}) for site in others}
    return found


def _plan(name: str, options: Mapping[str, Any]) -> Plan:
    return Plan([config_class(name).from_dict(options)])


def measure_matrix(
    settings: MatrixSettings, observe: Observe = lambda done, total, label: None
) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per cell, family by family, as soon as it is known; about a second each.

    `compute_left` is the share of plain's floating-point operations in the denoisers (attention included) that is left;
    `relative_difference` the L2 distance of the result to plain's, over plain's norm; both null where nothing ran.
    """
    plans, families = settings.plans(), settings.families or tuple(FAMILIES)
    cells = [(family, label) for family in families for label in plans]
    bench, stamp = None, run_stamp()
    for done, (family, label) in enumerate(cells):
        observe(done, len(cells), f"{label} on {family}")
        if bench is None or bench.family != family:
            bench = _Bench(family, settings)
        yield bench.row(label, plans[label]) | stamp
    observe(len(cells), len(cells), "")


@dataclass(frozen=True)
class _Verdict:
    status: str
    reason: str
    compute_left: float | None = None
    relative_difference: float | None = None
    max_abs: float | None = None
    phase: str | None = None


class _Bench:
    """One family: its pipeline, and what plain gives and costs."""

    def __init__(self, family: str, settings: MatrixSettings) -> None:
        self.family, self.settings = family, settings
        self.phase = "build"
        self.pipe: DiffEffPipeline | None = None
        self.plain, self.flops = torch.empty(0), 0

    def row(self, label: str, plan: Plan) -> dict[str, Any]:
        verdict = self.verdict(plan)
        return {
            "benchmark": "matrix",
            "version": 1,
            "family": self.family,
            "method": label,
            **vars(verdict),
            **self.described(),
            "plan": plan.to_dict(),
            "steps": self.settings.steps,
            "seed": self.settings.seed,
            "environment": environment(),
        }

    def described(self) -> dict[str, str | None]:
        """How diffeff describes the pipeline; nulls where there is none."""
        if self.pipe is None:
            return {"pipeline": None, "anatomy": None}
        return {"pipeline": type(self.pipe.wrapped).__name__, "anatomy": self.pipe.denoisers[0].family}

    def verdict(self, plan: Plan) -> _Verdict:
        try:
            return self.tried(self.prepared(), plan)
        except _REFUSALS as error:
            return _Verdict("refused", str(error), phase=self.phase)
        except Exception as error:  # whatever a method throws is the finding
            name = "" if isinstance(error, DiffEffError) else f"{type(error).__name__}: "
            broken, self.pipe = self.phase, None
            return _Verdict("fails", name + str(error), phase=broken)
        finally:
            self.clear()

    def prepared(self) -> DiffEffPipeline:
        """The pipeline without a plan; built anew after a failure, which may have damaged it."""
        if self.pipe is None:
            self.phase = "build"
            pipe = DiffEffPipeline(make(self.family, self.settings.seed))
            self.plain = self.run(pipe)
            self.flops = self.count(pipe)
            self.pipe = pipe
        return self.pipe

    def tried(self, pipe: DiffEffPipeline, plan: Plan) -> _Verdict:
        self.phase = "apply"
        pipe.apply(plan)
        self.phase = "run"
        found = self.run(pipe)
        outcomes = pipe.report.methods if pipe.report is not None else ()
        left = self.count(pipe) / max(self.flops, 1)
        self.phase = "remove"
        pipe.remove()
        if not torch.equal(self.run(pipe), self.plain):
            raise RuntimeError("plain gives another result after the plan was removed")
        self.phase = "run"
        if not torch.isfinite(found).all():
            raise RuntimeError("the result holds values that are not finite")
        acted = left < 1 or not torch.equal(found, self.plain)
        works = acted and all(outcome.engaged for outcome in outcomes)
        reason = "; ".join(outcome.reason for outcome in outcomes if works or not outcome.engaged)
        unchanged = "engaged, and the result is bit for bit that of plain"
        return _Verdict("works" if works else "idle", reason or unchanged, round(left, 4), *self.distance(found))

    def run(self, pipe: DiffEffPipeline) -> Tensor:
        return run(self.family, pipe, steps=self.settings.steps, seed=self.settings.seed)

    def count(self, pipe: DiffEffPipeline) -> int:
        with counting_flops(denoiser.module for denoiser in pipe.denoisers) as flops:
            self.run(pipe)
        return flops.count

    def distance(self, found: Tensor) -> tuple[float, float]:
        """Relative L2 and largest absolute difference to plain, in float64."""
        plain = self.plain.double()
        gap = found.double() - plain
        return float(f"{float(gap.norm() / plain.norm()):.4g}"), float(f"{float(gap.abs().amax()):.4g}")

    def clear(self) -> None:
        if self.pipe is not None:
            with suppress(DiffEffError):
                self.pipe.remove()
