"""Known traps of an installation, from users' issue threads: each is looked for, and said with its cure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

__all__ = ["TRAPS", "Finding", "available_memory", "distribution", "findings", "installed"]

_RIVALS = ("cache_dit", "DeepCache", "tomesd", "para_attn", "nunchaku", "xfuser", "pruna")
_LOW_MEMORY, _LOW_DISK = 4 * 2**30, 10 * 2**30


@dataclass(frozen=True)
class Finding:
    """A trap that is there. A warning breaks or slows something; a note is good to know."""

    name: str
    level: Literal["warning", "note"]
    what: str
    cure: str


def findings() -> list[Finding]:
    """Every trap that is present, in the order of TRAPS."""
    return [found for look in TRAPS for found in [look()] if found is not None]


def distribution(package: str) -> str | None:
    """Version of an installed distribution, None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed(package: str) -> str | None:
    """Version of a distribution, `?` for a module without one, None when neither is there."""
    found = distribution(package)
    if found is not None:
        return found
    try:
        return "?" if find_spec(package.replace("-", "_")) is not None else None
    except (ImportError, ValueError):
        return None


def available_memory() -> int | None:
    """Bytes this process may still take: the system's, or less where a control group limits it."""
    amounts = []
    info = Path("/proc/meminfo")
    if info.exists():
        line = next((x for x in info.read_text().splitlines() if x.startswith("MemAvailable")), None)
        amounts += [int(line.split()[1]) * 1024] if line else []
    group = Path("/sys/fs/cgroup")
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit.isdecimal() and (group / "memory.current").exists():
        amounts.append(max(0, int(limit) - int((group / "memory.current").read_text())))
    return min(amounts) if amounts else None


def _cpu_build() -> Finding | None:
    import torch

    if shutil.which("nvidia-smi") is None or torch.version.cuda is not None:
        return None
    what = "this machine has an NVIDIA driver, but torch is a build without CUDA: everything runs on the CPU"
    return Finding("torch-without-cuda", "warning", what, "install torch from the CUDA index that pytorch.org names")


def _fidelity_without_vision() -> Finding | None:
    if installed("torch-fidelity") is None or installed("torchvision") is not None:
        return None
    what = "torch-fidelity is installed without torchvision: importing torchmetrics' image metrics then fails"
    return Finding("torch-fidelity", "warning", what, "pip install torchvision, or pip uninstall torch-fidelity")


def _shadowed_kernels() -> Finding | None:
    spec = find_spec("kernels")
    ours = Path(__file__).parents[2] / "kernels" / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin) != ours:
        return None
    level: Literal["warning", "note"] = "note" if distribution("kernels") is None else "warning"
    what = "the folder kernels of this checkout is found before the Hugging Face package of that name"
    return Finding("kernels-shadowed", level, what, "start python from another folder, or set PYTHONSAFEPATH=1")


def _torchao() -> Finding | None:
    if installed("torchao") is None:
        return None
    what = f"torchao {installed('torchao')} prints on stderr when diffusers imports it, also where all is well"
    return Finding("torchao-noise", "note", what, "ignore lines about skipped C++ extensions; stdout stays clean")


def _rivals() -> Finding | None:
    there = [name for name in _RIVALS if installed(name) is not None]
    if not there:
        return None
    what = f"other acceleration tools are installed: {', '.join(there)}"
    cure = "use one at a time on a pipeline; diffeff refuses a pipeline on which it sees another one active"
    return Finding("other-tools", "note", what, cure)


def _offline() -> Finding | None:
    names = [
        n
        for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if os.environ.get(n, "0").lower() not in ("0", "", "false")
    ]
    if not names:
        return None
    what = f"{' and '.join(names)} is set: hub ids load only what is in the local cache already"
    return Finding("offline", "note", what, "unset it to download; bundled models and folders need no network")


def _memory() -> Finding | None:
    free = available_memory()
    if free is None or free >= _LOW_MEMORY:
        return None
    what = f"only {free / 2**30:.1f} GiB of memory are free: larger models will be killed while they load"
    return Finding("low-memory", "warning", what, "close other programs, or use a smaller or a quantised model")


def _disk() -> Finding | None:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    place = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    if free >= _LOW_DISK:
        return None
    what = f"only {free / 2**30:.1f} GiB are free where the hub's cache lies ({cache})"
    return Finding("low-disk", "warning", what, "set HF_HOME to a larger disk before loading hub models")


def _encoder() -> Finding | None:
    import av

    if "libx264" in av.codecs_available:
        return None
    what = "this build of PyAV has no H.264 encoder: .mp4 cannot be written"
    return Finding("no-h264", "warning", what, "pip install --force-reinstall av, or write .gif")


TRAPS: tuple[Callable[[], Finding | None], ...] = (
    _cpu_build,
    _fidelity_without_vision,
    _shadowed_kernels,
    _torchao,
    _rivals,
    _offline,
    _memory,
    _disk,
    _encoder,
)
