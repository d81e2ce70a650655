"""What a bench has to know of a loaded model before it can lay out its arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffeff.errors import DiffEffError
from diffeff.eval.bench.memory import available_bytes, held_bytes
from diffeff.eval.calls import parameters
from diffeff.kernels.microbench import chip
from diffeff.report import environment

__all__ = ["facts"]


def facts(pipe: Any, call: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """JSON-ready: the scheduler, the call's settings, the classes of a class-conditional model, memory, versions."""
    return {
        "pipeline": type(pipe).__name__,
        "fingerprint": _fingerprint(pipe),
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": _plain(dict(pipe.scheduler.config))},
        "call": dict(call),
        "classes": _classes(pipe) if "class_labels" in parameters(pipe) else None,
        "held_bytes": held_bytes(device),
        "available_bytes": available_bytes(device),
        "threads": torch.get_num_threads(),
        "environment": environment() | {"processor": chip(device)},
    }


def _fingerprint(pipe: Any) -> str | None:
    from diffeff.anatomy.table import denoisers
    from diffeff.stamp import stamp_of

    try:
        return stamp_of(pipe, denoisers(pipe)).fingerprint
    except DiffEffError:  # an architecture we do not know: plans are refused on it, peers may still run
        return None


def _classes(pipe: Any) -> int:
    return int(pipe.transformer.config.num_embeds_ada_norm)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | None) and k[:1] != "_"}
