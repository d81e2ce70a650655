"""From what was measured of an arm to its row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffeff.errors import ConfigError
from diffeff.eval.bench.arms import FEWER, Arm
from diffeff.eval.bench.peers import PEERS, installed
from diffeff.eval.bench.rows import adherence_of, fidelity_of, quartiles, ratios, strip
from diffeff.eval.bench.settings import BenchSettings, command
from diffeff.eval.bench.stamp import run_stamp
from diffeff.eval.bench.subjects import Subject, Subjects
from diffeff.eval.metrics.fidelity import mae, psnr, ssim
from diffeff.media import to_bytes

__all__ = ["Measured", "Recorder", "compared", "thin_out"]

VERSION = 1
_SSIM_WINDOW = 11
Entry = Mapping[str, Any]


def compared(
    reference: NDArray[np.float32], frames: NDArray[np.float32], subject: Subject, *, sheet: bool
) -> dict[str, Any]:
    """How far frames [F, H, W, 3] are from plain's, and what of the caption they show. With `sheet`, a picture, too."""
    try:
        value = psnr(reference, frames)
    except ConfigError as error:
        return {"error": {"phase": "compare", "type": "ConfigError", "message": str(error)}}
    return {
        "psnr": value if math.isfinite(value) else None,
        "ssim": ssim(reference, frames) if min(frames.shape[1:3]) >= _SSIM_WINDOW else None,
        "mae": mae(reference, frames),
        "identical": bool(np.array_equal(reference, frames)),
        "seen": _bools(subject.seen(frames)),
        "sheet": strip(to_bytes(frames)) if sheet else None,
    }


def _bools(seen: Mapping[str, Any] | None) -> dict[str, bool] | None:
    return None if seen is None else {name: bool(ok) for name, ok in seen.items()}


@dataclass(frozen=True)
class Measured:
    """Everything about one arm: an entry per prompt, and plain's entries of the same prompts."""

    arm: Arm
    error: Entry | None
    entries: Sequence[Entry]
    plain: Sequence[Entry]
    count: Entry
    plain_count: Entry
    memory: Entry | None

    @property
    def status(self) -> str:
        """Refused: we said no before anything ran. Failed: an error, whoever's."""
        if self.error is None:
            return "ok"
        ours = self.arm.kind in ("plan", "fewer-steps") and self.error["phase"] == "apply"
        return "refused" if ours else "failed"

    @property
    def idle(self) -> bool:
        """Whether it was to change something and every clip is plain's, bit by bit."""
        acts = self.arm.kind == "peer" or bool((self.arm.plan or {}).get("methods"))
        return acts and self.error is None and all(entry["identical"] for entry in self.entries)

    def times(self, name: str, of: Sequence[Entry] | None = None) -> list[float]:
        return [entry[name] for entry in (self.entries if of is None else of)]

    def numbers(self) -> dict[str, Any]:
        """The measured part of the row; all None for an arm without results."""
        if self.error is not None or not self.entries:
            return dict.fromkeys(_NUMBERS)
        flops, whole = self.count.get("flops"), self.plain_count.get("flops")
        return {
            "seconds": quartiles(self.times("seconds")),
            "cpu_seconds": quartiles(self.times("cpu_seconds")),
            "speedup": quartiles(ratios(self.times("seconds", self.plain), self.times("seconds"))),
            "cpu_speedup": quartiles(ratios(self.times("cpu_seconds", self.plain), self.times("cpu_seconds"))),
            "flops": round(flops / whole, 4) if flops is not None and whole else None,
            "peak_memory": dict(self.memory) if self.memory is not None and self.memory.get("bytes") else None,
            "fidelity": fidelity_of(self.entries),
            "adherence": adherence_of([entry["seen"] for entry in self.entries]),
            "samples": _samples(self.entries),
        }


_NUMBERS = (
    "seconds",
    "cpu_seconds",
    "speedup",
    "cpu_speedup",
    "flops",
    "peak_memory",
    "fidelity",
    "adherence",
    "samples",
)


def _samples(entries: Sequence[Entry]) -> dict[str, str] | None:
    sheets = [entry["sheet"] for entry in entries if entry.get("sheet")]
    return {"sheet": sheets[0]} if sheets else None


@dataclass(frozen=True)
class Recorder:
    """What the rows of one bench share."""

    settings: BenchSettings
    facts: Mapping[str, Any]
    subjects: Subjects
    turns: bool
    stamp: Mapping[str, str | None] = field(default_factory=run_stamp)

    def row(self, found: Measured) -> dict[str, Any]:
        """The JSON-ready row of one arm."""
        return {**self._head(), **self._arm(found), **self._outcome(found), **self._setting(found)}

    def _head(self) -> dict[str, Any]:
        return {
            "benchmark": "bench",
            "version": VERSION,
            **self.stamp,
            "model": self.settings.model,
            "model_fingerprint": self.facts["fingerprint"],
        }

    def _arm(self, found: Measured) -> dict[str, Any]:
        arm = found.arm
        call = {k: v for k, v in self.facts["call"].items() if k != "num_inference_steps"}
        return {
            "arm": {"kind": arm.kind, "name": arm.name, "label": arm.label, "options": dict(arm.options)},
            "plan": arm.plan,
            "steps": arm.steps,
            "call": call,
            "prompts": len(self.subjects.items),
            "prompt_set": self.subjects.name,
            "prompt_set_sha256": self.subjects.sha256,
            "seed": self.settings.seed,
        }

    def _outcome(self, found: Measured) -> dict[str, Any]:
        error = None if found.error is None else dict(found.error)
        details = {key: found.count[key] for key in ("notes", "engaged", "not_tried") if found.count.get(key)}
        return {"status": found.status, "error": error, "noop": found.idle, **found.numbers(), "details": details}

    def _setting(self, found: Measured) -> dict[str, Any]:
        arm, environment = found.arm, dict(self.facts["environment"])
        if arm.kind == "peer":
            package = PEERS[arm.name].package
            environment[package] = installed(package) or "not installed"
        return {
            "threads": self.facts["threads"],
            "device": self.settings.device,
            "dtype": self.settings.dtype,
            "alternation": "each package beside plain" if self.turns else "all arms prompt by prompt",
            "environment": environment,
            "command": command(self.settings, arm, len(self.subjects.items), self._prompts()),
        }

    def _prompts(self) -> str:
        """The prompt set as the command line wants it: a file by its path, a built-in set by its name."""
        return self.settings.prompts or self.subjects.name


def thin_out(rows: Sequence[dict[str, Any]]) -> None:
    """Keep the pictures of a sweep that people compare: plain, plans as they were named, fewer steps, and the middle
    point of every other curve. A hundred pictures would make the file of rows megabytes larger."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["samples"]:
            curves.setdefault(row["arm"]["name"], []).append(row)
    for name, points in curves.items():
        named = [row for row in points if not row["arm"]["options"]]
        kept = points if name == FEWER else named or [points[len(points) // 2]]
        for row in points:
            if row not in kept:
                row["samples"] = None
