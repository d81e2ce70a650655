"""Micro-benchmarks that choose between kernels: measured once per shape and machine, remembered, never guessed.

Timings are kept in the process and in a small JSON file per operation, machine and set of versions, so that a second
process chooses the same kernel at once. `DIFFEFF_KERNEL_CACHE` names the folder of those files (default:
`$XDG_CACHE_HOME/diffeff/kernels`, else `~/.cache/diffeff/kernels`); `off` keeps nothing on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["cache_file", "chip", "forget", "machine", "sample", "timings"]

log = logging.getLogger("diffeff")
_BUDGET = 0.3
"""Seconds after which no further round is started, per call of `timings`."""
_ROUNDS = (2, 9)
_SAMPLE = 2e-4
"""Seconds a single sample should last at least, so that the clock and the launch do not dominate it."""
_known: dict[tuple[str, str], dict[str, dict[str, float]]] = {}


def timings(
    op: str, key: str, device: torch.device, candidates: Mapping[str, Callable[[], object]]
) -> dict[str, float]:
    """Seconds per call of each candidate, from memory, from disk, or measured now (alternating, best of a few rounds).

    `key` says what was measured (shape, dtype); machine, device and versions are added here. A candidate that raises
    gets `inf`. Costs about a third of a second per key, once, and whatever the candidates allocate.
    """
    place = machine(device)
    table = _known.setdefault((op, place), {})
    if not table:
        table.update(_read(op, place))
    found = table.get(key, {})
    if not candidates.keys() <= found.keys():
        found = table[key] = found | _measure(candidates, device)
        _write(op, place, table)
    return {name: found[name] for name in candidates}


def forget() -> None:
    """Drop what the process remembers (files stay)."""
    _known.clear()


# --- measuring ------------------------------------------------------------------------------------------------------
def _measure(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    loops = {name: _loops(fn, device) for name, fn in candidates.items()}
    best = dict.fromkeys(candidates, float("inf"))
    deadline = time.perf_counter() + _BUDGET
    for done in range(_ROUNDS[1]):
        if done >= _ROUNDS[0] and time.perf_counter() > deadline:
            break
        for name, fn in candidates.items():  # alternating, so that a slow spell of the machine hits all of them
            if loops[name]:
                best[name] = min(best[name], sample(fn, loops[name], device))
    return best


def _loops(fn: Callable[[], object], device: torch.device) -> int:
    """Warms `fn` up and says how often to repeat it in one sample; 0 when it cannot run."""
    try:
        sample(fn, 1, device)
        once = sample(fn, 1, device)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        log.debug("micro-benchmark candidate left out: %s", error)
        return 0
    return max(1, min(50, int(_SAMPLE / max(once, 1e-7))))


def sample(fn: Callable[[], object], loops: int, device: torch.device) -> float:
    """Seconds of one call, the mean over `loops` in a row, with the device's queue emptied before and after."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(loops):
        fn()
    _synchronise(device)
    return (time.perf_counter() - start) / loops


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- remembering ----------------------------------------------------------------------------------------------------
@cache
def _versions() -> str:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__}, triton {triton}"


@cache
def _processor() -> str:
    """Model name of the CPU; the architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def chip(device: torch.device) -> str:
    """What a device is: the GPU's name, or the processor's with its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {platform.machine()}"


def machine(device: torch.device) -> str:
    """What a timing depends on besides shape and dtype: chip, number of threads, versions."""
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    return f"{chip(device)}, {threads}{_versions()}"


def cache_file(op: str, place: str) -> Path | None:
    """The file that holds the timings of `op` on the machine `place`; None when nothing is kept on disk."""
    folder = os.environ.get("DIFFEFF_KERNEL_CACHE", "")
    if folder.lower() in ("off", "0", "false"):
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffeff" / "kernels"
    digest = hashlib.sha256(place.encode()).hexdigest()[:12]
    return (Path(folder) if folder else base) / f"{op}-{digest}.json"


def _read(op: str, place: str) -> dict[str, dict[str, float]]:
    path = cache_file(op, place)
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stored = data["seconds"] if data["machine"] == place else {}
        return {key: {name: float(value) for name, value in row.items()} for key, row in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no file yet, or a damaged one: measured and written anew


def _write(op: str, place: str, table: Mapping[str, Mapping[str, float]]) -> None:
    path = cache_file(op, place)
    if path is None:
        return
    merged = _read(op, place) | {key: dict(row) for key, row in table.items()}
    text = json.dumps({"machine": place, "seconds": merged}, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)  # atomic: a reader sees the old file or the new one
    except OSError as error:
        log.debug("kernel timings are not kept on disk: %s", error)
