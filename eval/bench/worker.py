"""A worker process of the bench: one copy of the model, and the arms of one package put on it one after the other.

`python -m diffeff.eval.bench.worker` reads a JSON request per line from stdin and answers each with a JSON line on
stdout; whatever the packages print goes to stderr. Frames travel as .npy files. It ends when stdin does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from diffeff import loading
from diffeff.errors import DiffEffError
from diffeff.eval.bench.arms import Arm
from diffeff.eval.bench.facts import facts
from diffeff.eval.bench.flops import counting_flops
from diffeff.eval.bench.memory import measured
from diffeff.eval.bench.peers import Request, peer
from diffeff.eval.bench.solvers import make_solver
from diffeff.eval.calls import options_of
from diffeff.eval.settings import CallSettings
from diffeff.media import frames_of
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan

__all__ = ["Job", "Worker", "main"]

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What a worker loads, and the arguments of a call that go before the recommended ones."""

    model: str
    device: str
    dtype: str
    threads: int | None
    call: Mapping[str, Any] = field(default_factory=dict)


def _call(pipe: Any, job: Job) -> dict[str, Any]:
    options = options_of(job.model, CallSettings(**job.call), pipe)
    return {name: value for name, value in options.items() if name != "output_type"}


class PhaseError(Exception):
    """An error of an arm with the phase in which it came: `import`, `apply` or `run`."""

    def __init__(self, phase: str, error: BaseException) -> None:
        super().__init__(str(error))
        self.phase, self.error = phase, error


class Worker:
    """The model, and what is asked of it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        _quiet()
        self.pipe = loading.load(job.model, dtype=getattr(torch, job.dtype)).to(job.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = _call(self.pipe, job)
        self.notes: dict[str, Any] = {}
        self.subject: Mapping[str, Any] = {}

    # --- requests ---------------------------------------------------------------------------------------------------
    def describe(self, message: Message) -> dict[str, Any]:
        """What the parent needs to know of the model and of this process."""
        return facts(self.pipe, self.call, torch.device(self.job.device))

    def run(self, message: Message) -> dict[str, Any]:
        """One timed call of an arm: wall and process-CPU seconds; the frames go to the file `frames`."""
        arm = self._take(message)
        with self._put_on(arm) as pipe:
            frames, wall, cpu = self._call(pipe, arm, message["seed"])
        np.save(message["frames"], frames)
        return {"seconds": wall, "cpu_seconds": cpu, "notes": self.notes}

    def count(self, message: Message) -> dict[str, Any]:
        """One untimed call of an arm with its floating-point operations; it warms the process up for that arm."""
        arm = self._take(message)
        with self._put_on(arm) as pipe, counting_flops(_denoisers(self.pipe)) as flops:
            self._call(pipe, arm, message["seed"])
            engaged = _engaged(pipe)
        return {"flops": flops.count, "notes": self.notes, "engaged": engaged}

    def memory(self, message: Message) -> dict[str, Any]:
        """Peak memory of one call of an arm. The process must be fresh: what it used before would hide the peak."""
        arm = self._take(message)
        with measured(torch.device(self.job.device)) as memory, self._put_on(arm) as pipe:
            self._call(pipe, arm, message["seed"])
        return memory.to_dict()

    # --- arms -------------------------------------------------------------------------------------------------------
    def _take(self, message: Message) -> Arm:
        self.notes = dict(message.get("notes") or {})
        self.subject = message["subject"]
        return Arm.from_dict(message["arm"])

    @contextmanager
    def _put_on(self, arm: Arm) -> Iterator[Any]:
        """The pipeline with the arm on it, and without it afterwards."""
        with _phase("apply"):
            pipe, undo = self._apply(arm)
        try:
            yield pipe
        finally:
            undo()

    def _apply(self, arm: Arm) -> tuple[Any, Callable[[], None]]:
        if arm.kind == "plan":
            plan = Plan.from_dict(arm.plan or {}, None if arm.folder is None else Path(arm.folder))
            wrapped = DiffEffPipeline(self.pipe, plan)
            return wrapped, lambda: _discard(wrapped.remove())
        if arm.kind == "peer":
            return self.pipe, self._peer(arm)
        if arm.solver is not None:
            own, self.pipe.scheduler = self.pipe.scheduler, make_solver(arm.solver, self.pipe.scheduler)
            return self.pipe, lambda: setattr(self.pipe, "scheduler", own)
        return self.pipe, lambda: None

    def _peer(self, arm: Arm) -> Callable[[], None]:
        with _phase("import"):
            function = peer(arm.name).load()
        run = lambda: _discard(self._call(self.pipe, arm, 10_000))  # noqa: E731 (a seed that no prompt has)
        return function(Request(self.pipe, arm.options, arm.steps, run, self.notes))

    def _call(self, pipe: Any, arm: Arm, seed: int) -> tuple[Any, float, float]:
        noise = torch.Generator("cpu").manual_seed(seed)  # noise drawn on the CPU is the same on every device
        options = {**self.call, **self.subject, "num_inference_steps": arm.steps, "output_type": "np"}
        gc.collect()  # of what putting arms on and taking them off left behind: not the arm's to pay
        with _phase("run"):
            self._wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            output = pipe(**options, generator=noise)
            self._wait()
            wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            frames = frames_of(output)
            if not np.isfinite(frames).all():
                raise DiffEffError(f"the result of {arm.label} holds pixels that are not numbers")
        return frames, wall, cpu

    def _wait(self) -> None:
        device = torch.device(self.job.device)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()


@contextmanager
def _phase(name: str) -> Iterator[None]:
    try:
        yield
    except PhaseError:
        raise
    except Exception as error:
        raise PhaseError(name, error) from error


def _denoisers(pipe: Any) -> list[torch.nn.Module]:
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet"))
    return [module for module in found if isinstance(module, torch.nn.Module)]


def _engaged(pipe: Any) -> list[dict[str, Any]]:
    """What each method of a plan says it did."""
    report = pipe.report if type(pipe) is DiffEffPipeline else None
    methods = report.methods if report is not None else ()
    return [{"method": m.method, "engaged": m.engaged, "reason": m.reason} for m in methods]


def _discard(value: object) -> None:
    """For callbacks that return nothing."""


def _quiet() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


# --- the process ----------------------------------------------------------------------------------------------------
def answer(worker: Worker, message: Message) -> dict[str, Any]:
    """The reply to one request; an error of an arm is a reply, too."""
    actions = {"describe": worker.describe, "run": worker.run, "count": worker.count, "memory": worker.memory}
    try:
        return actions[message["do"]](message)
    except PhaseError as error:
        return {"error": _described(error.phase, error.error)}
    except Exception as error:
        return {"error": _described(message["do"], error)}


def _described(phase: str, error: BaseException) -> dict[str, Any]:
    sys.stderr.write("".join(traceback.format_exception(error)))
    ours = isinstance(error, DiffEffError)
    return {"phase": phase, "type": type(error).__name__, "message": str(error), "ours": ours}


def main() -> None:
    """Serve one parent until it closes its end."""
    replies = _own_stdout()
    worker: Worker | None = None
    for line in sys.stdin:
        message = json.loads(line)
        if worker is None:
            try:
                worker = Worker(Job(**message))
                reply: dict[str, Any] = {}
            except Exception as error:
                reply = {"error": _described("load", error)}
        else:
            reply = answer(worker, message)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _own_stdout() -> TextIO:
    """The stream of replies; everything else that is written to stdout, also by C code, goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main()
