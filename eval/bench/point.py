"""Peak memory at one point of an axis, in a process that has done nothing else.

`python -m diffeff.eval.bench.point` reads one JSON request from stdin and answers with one JSON line on stdout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffeff.errors import DiffEffError
from diffeff.eval.bench.axes import Point, Subject, subject_of
from diffeff.eval.bench.memory import measured
from diffeff.plan import Plan

__all__ = ["fresh_memory", "memory_here"]


def fresh_memory(request: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes of one call in a fresh process; keys and `None`s as of `bench.memory.Memory`.

    `request`: `model`, `call`, `device`, `dtype`, `threads`, `seed`, `plan` (JSON object or None) with `folder`, `axis`
    and `value`. The call runs once before it is measured, so that what a first call sets up is not counted.
    Raises DiffEffError with the last line the process wrote when it fails.
    """
    safe = ["-P"] if sys.flags.safe_path else []
    done = subprocess.run(
        [sys.executable, *safe, "-m", "diffeff.eval.bench.point"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        raise DiffEffError(f"memory of {request['model']} at {request['axis']} {request['value']}: {said[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_here(subject: Subject, point: Point, seed: int, device: torch.device) -> dict[str, Any]:
    """The same in this process, with the plan that is on the pipeline. On CUDA as good as in a fresh one; elsewhere
    memory that earlier calls freed and the allocator kept can hide part of the peak."""
    _release()
    call = subject.call(point, seed)
    with measured(device) as memory, torch.no_grad():
        subject.pipe(**call)
    return memory.to_dict() | {"how": memory.how.replace("a fresh process", "this process")}


def _release() -> None:
    """Give freed memory back to the system, so that the next peak starts from what is really held."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process does: load, apply the plan, warm up, measure."""
    torch.set_num_threads(request["threads"])
    subject = subject_of(request["model"], request["call"], request["device"], request["dtype"])
    if request["plan"] is not None:
        folder = request["folder"]
        subject.pipe.apply(Plan.from_dict(request["plan"], None if folder is None else Path(folder)))
    point, seed = Point(request["axis"], request["value"]), request["seed"]
    with torch.no_grad():
        subject.pipe(**subject.call(point, seed))
    found = memory_here(subject, point, seed, torch.device(request["device"]))
    return found | {"how": found["how"].replace("this process", "a fresh process")}


def main() -> None:
    """Answer one request. Whatever libraries print to stdout, also from C, goes to stderr."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    reply.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")
    reply.flush()


if __name__ == "__main__":
    main()
