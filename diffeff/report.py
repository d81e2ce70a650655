"""What a run did: requested and engaged methods, steps and blocks computed, seconds per stage, memory, warnings."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from diffeff.core.run import Counts, Run
from diffeff.core.session import Session

__all__ = ["MethodOutcome", "Report", "Share", "environment"]


@dataclass(frozen=True)
class MethodOutcome:
    """One method of the plan: asked for, did it act, what it did or why not."""

    method: str
    options: Mapping[str, Any]
    engaged: bool
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """How much was computed out of how much; fractions arise when only some batch rows were computed."""

    computed: float
    total: int

    def __str__(self) -> str:
        return f"{self.computed:g} of {self.total}"


@dataclass(frozen=True)
class Report:
    """The last call of a DiffEffPipeline. Printable; `to_dict()` is JSON-ready, `to_markdown()` a page.

    `seconds` has the stages load, encode, denoise, decode and total. `peak_bytes` is the most memory held during the
    call: allocated on CUDA, resident set of the process on CPU; None where the system does not tell.
    """

    pipeline: str
    family: str
    plan: str
    steps: Mapping[str, Share]
    blocks: Mapping[str, Share]
    methods: tuple[MethodOutcome, ...]
    seconds: Mapping[str, float]
    peak_bytes: int | None
    warnings: tuple[str, ...]
    environment: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: dicts, lists and scalars only."""
        return asdict(self) | {"methods": [asdict(m) for m in self.methods], "warnings": list(self.warnings)}

    def __str__(self) -> str:
        lines = [f"{self.pipeline} ({self.family}), plan {self.plan}"]
        for outcome in self.methods:
            state = "engaged" if outcome.engaged else "NOT engaged"
            lines.append(f"  {outcome.method}: {state}. {outcome.reason}".rstrip(" ."))
        for title, shares in (("steps", self.steps), ("blocks", self.blocks)):
            if shares:
                lines.append(f"  {title} computed: " + ", ".join(f"{k} {v}" for k, v in shares.items()))
        lines.append("  seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        if self.peak_bytes is not None:
            lines.append(f"  peak memory: {self.peak_bytes / 2**20:.0f} MiB")
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """A short Markdown page of the same facts."""
        rows = [f"| {m.method} | {'yes' if m.engaged else '**no**'} | {m.reason} |" for m in self.methods]
        table = ["| method | engaged | what it did, or why not |", "|---|---|---|", *rows] if rows else ["No methods."]
        shares = [
            f"- {k} computed, {b}: {v}"
            for k, s in (("steps", self.steps), ("blocks", self.blocks))
            for b, v in s.items()
        ]
        seconds = "- seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items())
        memory = [] if self.peak_bytes is None else [f"- peak memory: {self.peak_bytes / 2**20:.0f} MiB"]
        notes = [f"- **warning:** {text}" for text in self.warnings]
        where = "- " + ", ".join(f"{k} {v}" for k, v in self.environment.items())
        head = [f"# {self.pipeline} ({self.family}), plan {self.plan}", ""]
        return "\n".join([*head, *table, "", *shares, seconds, *memory, *notes, where]) + "\n"

    @classmethod
    def of(
        cls,
        session: Session,
        run: Run,
        plan: str,
        load_seconds: float | None,
        peak_bytes: int | None,
        device: str,
        dtype: str,
    ) -> Report:
        """The report of a run that has closed."""
        outcomes = tuple(_outcome(m, run) for m in session.methods)
        warnings = list(run.warnings) + [f"{o.method} did nothing: {o.reason}" for o in outcomes if not o.engaged]
        return cls(
            pipeline=run.pipeline,
            family=session.denoisers[0].family,
            plan=plan,
            steps=_shares(run.steps),
            blocks=_shares(run.blocks),
            methods=outcomes,
            seconds=_seconds(run, load_seconds),
            peak_bytes=peak_bytes,
            warnings=tuple(warnings),
            environment=environment() | {"device": device, "dtype": dtype},
        )


def environment() -> dict[str, str]:
    """Versions that decide a result."""
    found = {"diffeff": _version("diffeff"), "torch": torch.__version__, "diffusers": _version("diffusers")}
    return found | {"python": platform.python_version()}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "checkout"


def _outcome(method: Any, run: Run) -> MethodOutcome:
    engaged, reason = run.outcomes.get(id(method), (False, "the run ended before it could act"))
    options = {k: v for k, v in method.config.to_dict().items() if k != "use"}
    return MethodOutcome(method.config.name, options, engaged, reason, run.details.get(id(method), {}))


def _shares(counts: Mapping[str, Counts]) -> dict[str, Share]:
    return {branch: Share(round(c.computed, 3), c.total) for branch, c in counts.items()}


def _seconds(run: Run, load: float | None) -> dict[str, float]:
    end = run.finished or run.started
    first = run.first_call or end
    updated = run.updated or first
    stages = {"encode": first - run.started, "denoise": updated - first, "decode": end - updated}
    head = {} if load is None else {"load": load}
    return head | stages | {"total": end - run.started}
