"""Recorded benchmark rows as a reader needs them: the newest run of each model, and its cells with numbers at hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffeff.errors import ArtefactError, ConfigError

__all__ = ["ATTRIBUTES", "Adherence", "Cell", "Row", "Spread", "cells", "latest", "models", "newest", "of", "read_rows"]

Row = Mapping[str, Any]
State = Literal["ok", "idle", "failed", "refused"]

ATTRIBUTES = ("all", "colour", "shape", "motion", "camera")
"""Attributes of adherence in the order in which tables show them."""


@dataclass(frozen=True)
class Spread:
    """A number with how far it spreads: quartiles of a time or ratio, a 95 % interval of a mean or a proportion."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Adherence:
    """Share of clips that show an attribute of their caption: `right` of `trials`, with its 95 % interval."""

    right: int
    trials: int
    share: Spread


@dataclass(frozen=True)
class Cell:
    """One arm of a run. What was not measured is None; `psnr` is infinite where every clip is bit-identical to plain.

    `group` is what the settings of one sweep share, `package` whose code it is (diffeff, cache-dit, plain, ...).
    `idle` is an arm that ran and changed nothing: the clips are plain's.
    """

    row: Row = field(repr=False)
    kind: str
    label: str
    group: str
    package: str
    state: State
    steps: int | None
    speed: Spread | None
    cpu_speed: Spread | None
    seconds: Spread | None
    psnr: Spread | None
    worst: float | None
    flops: float | None
    peak_bytes: int | None
    adherence: Mapping[str, Adherence]

    @property
    def message(self) -> str:
        """Why there are no numbers, in the words of the package that gave up; empty when there are."""
        error = self.row.get("error") or {}
        parts = (error.get("type"), error.get("message"))
        return ": ".join(str(part) for part in parts if part) or ("no reason given" if self.hopeless else "")

    @property
    def phase(self) -> str:
        """Where it failed: `import`, `apply`, `run`, ..."""
        return str((self.row.get("error") or {}).get("phase") or "")

    @property
    def hopeless(self) -> bool:
        return self.state in ("failed", "refused")

    @property
    def is_plain(self) -> bool:
        return self.kind == "plain"

    @property
    def rated(self) -> bool:
        """Whether it can stand in a plot of speed against PSNR: it ran, it acts, and both were measured."""
        return self.state == "ok" and not self.is_plain and self.speed is not None and self.psnr is not None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Raises ArtefactError without it, ConfigError naming a line that is no row."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read the results {path}: {error}. `diffeff bench` writes such a file.") from error
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error}). Remove the line, or measure again.") from error
    if not isinstance(row, dict) or "benchmark" not in row:
        raise ConfigError(f"{path}, line {number}: not a result row, it has no 'benchmark'. Remove the line.")
    return row


def of(rows: Iterable[Row], benchmark: str) -> list[Row]:
    """The rows of one benchmark (`bench`, `matrix`, `scaling`, ...)."""
    return [row for row in rows if row.get("benchmark") == benchmark]


def models(rows: Iterable[Row]) -> list[str]:
    """The models of the rows, each once, in order of appearance."""
    return list(dict.fromkeys(str(row["model"]) for row in rows if "model" in row))


def newest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last row of each combination of `keys`, in the order in which the combinations first appear."""
    found: dict[str, Row] = {}
    for row in rows:
        found[json.dumps([row.get(key) for key in keys], sort_keys=True)] = row
    return list(found.values())


def latest(rows: Iterable[Row], model: str) -> list[Row]:
    """The bench rows of the newest run of one model: those that share the `run` of its last row."""
    mine = [row for row in of(rows, "bench") if row["model"] == model]
    return [row for row in mine if row["run"] == mine[-1]["run"]]


def cells(rows: Sequence[Row]) -> list[Cell]:
    """The arms of one run, plain first, otherwise in the order of the rows."""
    return sorted((_cell(row) for row in rows), key=lambda cell: not cell.is_plain)


def _cell(row: Row) -> Cell:
    arm, fidelity = row["arm"], row.get("fidelity") or {}
    psnr = fidelity.get("psnr") or {}
    return Cell(
        row=row,
        kind=str(arm["kind"]),
        label=str(arm.get("label") or arm["name"]),
        group=_group(arm),
        package=_package(arm),
        state=_state(row),
        steps=row.get("steps"),
        speed=_quartiles(row.get("speedup")),
        cpu_speed=_quartiles(row.get("cpu_speedup")),
        seconds=_quartiles(row.get("seconds")),
        psnr=_psnr(psnr, fidelity, int(row.get("prompts") or 0)),
        worst=psnr.get("min"),
        flops=row.get("flops"),
        peak_bytes=(row.get("peak_memory") or {}).get("bytes"),
        adherence=dict(_adherence(row.get("adherence") or {})),
    )


def _state(row: Row) -> State:
    status = row.get("status", "ok")
    if status in ("failed", "refused"):
        return "failed" if status == "failed" else "refused"
    return "idle" if row.get("noop") and row["arm"]["kind"] != "plain" else "ok"


def _group(arm: Mapping[str, Any]) -> str:
    """`diffusers FirstBlockCache` of `diffusers FirstBlockCache, threshold 0.1`; of fewer steps, the solver; of plan
    files `NAME-35db.json` that were tuned for so many dB, `NAME tuned`."""
    label = str(arm.get("label") or arm["name"])
    if arm["kind"] == "fewer-steps":
        return re.sub(r",? *\d+ steps?$", "", label) or label
    if arm["kind"] == "plan":
        return re.sub(r"-\d+db\.json$", " tuned", str(arm["name"]))
    return label.partition(",")[0]


def _package(arm: Mapping[str, Any]) -> str:
    kind = str(arm["kind"])
    if kind == "peer":
        return str(arm["name"]).partition(":")[0]
    return "diffeff" if kind == "plan" else kind


def _quartiles(entry: Mapping[str, Any] | None) -> Spread | None:
    return None if not entry else Spread(entry["median"], entry["q1"], entry["q3"])


def _psnr(psnr: Mapping[str, Any], fidelity: Mapping[str, Any], prompts: int) -> Spread | None:
    """A mean without an interval (one prompt) spreads not at all."""
    if psnr.get("mean") is not None:
        mean = float(psnr["mean"])
        low, high = psnr.get("low"), psnr.get("high")
        return Spread(mean, mean if low is None else low, mean if high is None else high)
    same = prompts > 0 and fidelity.get("identical") == prompts
    return Spread(math.inf, math.inf, math.inf) if same else None


def _adherence(entries: Mapping[str, Any]) -> Iterator[tuple[str, Adherence]]:
    for name in (*ATTRIBUTES, *(name for name in entries if name not in ATTRIBUTES)):
        if name in entries:
            entry = entries[name]
            low, high = entry["interval95"]
            yield name, Adherence(entry["right"], entry["trials"], Spread(entry["accuracy"], low, high))
