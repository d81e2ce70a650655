"""A bench: plain, plans, other tools and fewer steps make the same clips from the same seeds, taking turns.

Protocol. Each package runs in a process of its own (some patch classes); plans and fewer steps share plain's. All
processes live at once and one runs at a time, so a busy machine slows all arms alike. Every arm first runs once
untimed in its process. Then prompt by prompt each arm makes one clip, in reversed order every other prompt; a speed-up
is the median over prompts of that prompt's ratio to plain, and fidelity is measured against that prompt's plain clip.
Where the model is so large that only one process fits, each package is measured after the other, beside plain in its
own process. Peak memory comes from one more call per arm in a fresh process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffeff.errors import DiffEffError, MissingExtra
from diffeff.eval.bench.arms import OURS, Arm, Wanted, expand, plain_arm, wanted_against, wanted_plans
from diffeff.eval.bench.channel import WorkerError
from diffeff.eval.bench.peers import PEERS, installed
from diffeff.eval.bench.pool import Pool, needs_turns
from diffeff.eval.bench.record import Measured, Recorder, compared, thin_out
from diffeff.eval.bench.rows import append, check_appendable
from diffeff.eval.bench.settings import BenchSettings
from diffeff.eval.bench.store import Store, scratch_folder
from diffeff.eval.bench.subjects import Subject, subjects_of

__all__ = ["BenchSettings", "Observe", "run_bench", "work_folder"]

Observe = Callable[[int, int, str], None]
"""Called with runs done, runs in all, and what comes next."""
Entry = dict[str, Any]


def run_bench(settings: BenchSettings, observe: Observe = lambda done, total, label: None) -> list[dict[str, Any]]:
    """Measure, append the rows to `settings.out` and return them: plain first, then plans, peers and fewer steps.

    An arm that fails or is refused has a row that says so; the others go on. Killed, it goes on where it was when it is
    called again with the same settings: rounds in which every arm had its turn are kept, others are run again. Disk:
    one prompt's clips of all arms, as float32, in the work folder.
    Raises what `wanted_plans` and `wanted_against` raise, OutputError, and DiffEffError when the model cannot be loaded
    or plain itself fails: there is nothing to compare with then.
    """
    wanted = [*wanted_plans(settings.plans), *wanted_against(settings.against)]
    if settings.out is not None:
        check_appendable(settings.out)
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder(work_folder(settings)))
        pool = stack.enter_context(Pool(_job(settings), scratch / "logs", settings.patience))
        facts = pool.describe(OURS)
        bench = _Bench(settings, facts, wanted, pool, scratch, observe)
        rows = bench.rows()
    if settings.out is not None:
        append(settings.out, rows)
    bench.store.clear()
    return rows


def work_folder(settings: BenchSettings) -> Path:
    """Where unfinished results wait: beside the file of rows, or with the temporary files."""
    if settings.work is not None:
        return settings.work
    if settings.out is not None:
        return settings.out.with_name(f".{settings.out.stem}.work")
    return Path(tempfile.gettempdir()) / "diffeff-bench.work"


def _job(settings: BenchSettings) -> dict[str, Any]:
    names = ("model", "device", "dtype", "threads")
    return {name: getattr(settings, name) for name in names} | {"call": asdict(settings.call)}


@dataclass
class _Batch:
    """Arms that take turns, and the worker that runs plain beside them."""

    worker: str
    arms: Sequence[Arm]
    rounds: list[Entry] = field(default_factory=list)


class _Bench:
    """One bench in progress."""

    def __init__(
        self,
        settings: BenchSettings,
        facts: Mapping[str, Any],
        wanted: Sequence[Wanted],
        pool: Pool,
        scratch: Path,
        observe: Observe,
    ) -> None:
        self.settings, self.facts, self.pool, self.scratch, self.observe = settings, facts, pool, scratch, observe
        steps = int(facts["call"]["num_inference_steps"])
        self.plain = plain_arm(steps)
        self.arms = expand(wanted, facts["scheduler"], steps, settings.sweep)
        self.subjects = subjects_of(settings.model, facts, settings.prompts, settings.limit, settings.seed)
        workers = list(dict.fromkeys([OURS, *(arm.worker for arm in self.arms)]))
        self.pool.turns = _turns(settings, facts, len(workers))
        self.batches = self._batches(workers)
        self.store = Store(work_folder(settings), self._identity())
        self.errors: dict[str, Entry] = {}
        self.counts: dict[str, Entry] = {}
        runs = sum(len(batch.arms) + 1 for batch in self.batches) * (1 + len(self.subjects.items))
        self.done, self.total = 0, runs + (len(self.arms) + 1) * settings.memory

    def rows(self) -> list[dict[str, Any]]:
        """Everything there is to measure."""
        for batch in self.batches:
            self._count_all(batch)
            for number, subject in enumerate(self.subjects.items):
                if batch.worker == OURS or any(arm.key not in self.errors for arm in batch.arms):
                    batch.rounds.append(self._round(batch, number, subject))
        memory = {arm.key: self._memory(arm) for arm in (self.plain, *self._tried()) if self.settings.memory}
        recorder = Recorder(self.settings, self.facts, self.subjects, self.pool.turns)
        rows = [recorder.row(self._measured(self.batches[0], self.plain, memory))]
        for arm in self._tried():
            batch = next(batch for batch in self.batches if arm in batch.arms)
            rows.append(recorder.row(self._measured(batch, arm, memory)))
        if self.settings.sweep:
            thin_out(rows)
        return rows

    def _tried(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.key in self.counts]

    # --- layout -----------------------------------------------------------------------------------------------------
    def _batches(self, workers: Sequence[str]) -> list[_Batch]:
        """All arms in one batch; or one batch per worker, when only one can be alive."""
        if not self.pool.turns:
            return [_Batch(OURS, self.arms)]
        return [_Batch(worker, [arm for arm in self.arms if arm.worker == worker]) for worker in workers]

    def _identity(self) -> dict[str, Any]:
        """Everything that decides a measurement; the prompts decide the names inside the store."""
        packages = {PEERS[arm.name].package for arm in self.arms if arm.kind == "peer"}
        return {
            **{name: self.facts[name] for name in ("fingerprint", "call", "threads", "environment")},
            **{name: getattr(self.settings, name) for name in ("model", "device", "dtype")},
            "scheduler": self.facts["scheduler"],
            "turns": self.pool.turns,
            "arms": [arm.key for arm in (self.plain, *self.arms)],
            "packages": {package: installed(package) for package in sorted(packages)},
        }

    # --- runs -------------------------------------------------------------------------------------------------------
    def _count_all(self, batch: _Batch) -> None:
        """The untimed runs. Where the first point of a sweep fails, its other points are not tried."""
        self._count(batch, self.plain)
        first: dict[str, Arm] = {}
        for arm in batch.arms:
            head = first.setdefault(arm.name, arm)
            if head is not arm and head.key in self.errors:
                self.counts[head.key].setdefault("not_tried", []).append(arm.label)
                self.total -= 1 + len(self.subjects.items) + self.settings.memory
            else:
                self._count(batch, arm)
        batch.arms = [arm for arm in batch.arms if arm.key in self.counts]

    def _count(self, batch: _Batch, arm: Arm) -> None:
        """The untimed run: what an arm computes, and whether it works at all."""
        name = f"count-{arm.key}" if arm is not self.plain else f"count-plain-{batch.worker}"
        entry = self.store.get(name)
        if entry is None:
            self._say(f"first run: {arm.label}")
            entry = self._ask("count", batch, arm, self.subjects.items[0])
            self.store.put(name, entry)
        self.done += 1
        if arm is self.plain and "error" in entry:
            raise _hopeless(entry["error"])
        if "error" in entry:
            self.errors[arm.key] = entry["error"]
        self.counts[arm.key] = entry

    def _round(self, batch: _Batch, number: int, subject: Subject) -> Entry:
        """One prompt by every arm of the batch: an entry per arm, by its key."""
        name = f"round-{batch.worker}-{subject.key}"
        found = self.store.get(name)
        if found is None:
            arms = [arm for arm in (self.plain, *batch.arms) if arm.key not in self.errors]
            found = self._turns(batch, arms[::-1] if number % 2 else arms, number, subject)
            self.store.put(name, found)
        self.done = self.done + 1 + len(batch.arms)
        self.errors |= {key: entry["error"] for key, entry in found.items() if "error" in entry}
        return found

    def _turns(self, batch: _Batch, order: Sequence[Arm], number: int, subject: Subject) -> Entry:
        entries: Entry = {}
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            files = {arm.key: Path(folder) / f"{arm.key}.npy" for arm in order}
            for turn, arm in enumerate(order):
                self._say(f"prompt {number + 1} of {len(self.subjects.items)}: {arm.label}", turn)
                entries[arm.key] = self._ask("run", batch, arm, subject, files[arm.key])
                if arm is self.plain and "error" in entries[arm.key]:
                    raise _hopeless(entries[arm.key]["error"])
            reference = np.load(files[self.plain.key])
            for arm in order:
                if "error" not in entries[arm.key]:
                    entries[arm.key] |= compared(reference, np.load(files[arm.key]), subject, sheet=number == 0)
        return entries

    def _ask(self, what: str, batch: _Batch, arm: Arm, subject: Subject, frames: Path | None = None) -> Entry:
        worker = batch.worker if arm is self.plain else arm.worker
        request = subject.request() | {"notes": self.counts.get(arm.key, {}).get("notes")}
        try:
            if arm.kind == "peer":
                PEERS[arm.name].load()  # what is not installed needs no process to say so
            if frames is None:
                return self.pool.ask(worker, what, arm, request)
            return self.pool.run(worker, arm, request, frames)
        except MissingExtra as error:
            return {"error": {"phase": "import", "type": "MissingExtra", "message": str(error)}}
        except WorkerError as error:
            return {"error": error.to_dict()}

    def _memory(self, arm: Arm) -> Entry | None:
        """None for an arm that fails, also when it fails only here (a fresh process may lack the memory)."""
        self.done += 1
        name = f"memory-{arm.key}"
        found = self.store.get(name)
        if found is None and arm.key not in self.errors:
            self._say(f"memory: {arm.label}", -1)
            request = self.subjects.items[0].request() | {"notes": self.counts[arm.key].get("notes")}
            try:
                found = self.pool.fresh("memory", arm, request)
            except WorkerError as error:
                found = {"bytes": None, "how": str(error)}
            self.store.put(name, found)
        return found

    def _measured(self, batch: _Batch, arm: Arm, memory: Mapping[str, Entry | None]) -> Measured:
        return Measured(
            arm=arm,
            error=self.errors.get(arm.key),
            entries=[found[arm.key] for found in batch.rounds if arm.key in found],
            plain=[found[self.plain.key] for found in batch.rounds],
            count=self.counts[arm.key],
            plain_count=self.counts[self.plain.key],
            memory=memory.get(arm.key),
        )

    def _say(self, what: str, ahead: int = 0) -> None:
        self.observe(self.done + ahead, self.total, what)


def _turns(settings: BenchSettings, facts: Mapping[str, Any], workers: int) -> bool:
    if settings.turns is not None:
        return settings.turns
    return needs_turns(facts["held_bytes"], facts["available_bytes"], workers)


def _hopeless(error: Mapping[str, Any]) -> DiffEffError:
    return DiffEffError(
        f"plain itself fails, so there is nothing to compare with: [{error['phase']}] {error['message']}"
    )
