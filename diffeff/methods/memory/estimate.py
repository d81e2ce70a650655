"""How much memory a call will take, stage by stage, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.method import Method
from diffeff.methods.memory.estimate_ops import Tally
from diffeff.methods.memory.estimate_scratch import MARGIN
from diffeff.methods.memory.estimate_time import seconds_of
from diffeff.methods.memory.estimate_trace import dry_run

__all__ = ["Estimate", "Stage", "estimate_peak", "weight_bytes"]


@dataclass(frozen=True)
class Stage:
    """One stage of a call; all sizes in bytes, at the stage's peak.

    `weights`: of the parts that are on the device then. `activations`: tensors alive besides weights and snapshots.
    `snapshots`: what caches keep from step to step. `scratch`: inside operators, by rule. `rounding`: of the allocator.
    `operator`: where the peak stands. `parts`: networks at work, called `calls` times,
    with so many `operators`. `seconds`: predicted, good for comparing two estimates on one machine.
    """

    weights: int
    activations: int
    snapshots: int
    scratch: int
    rounding: int
    operator: str
    parts: tuple[str, ...]
    calls: int
    operators: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes on the device at the stage's peak."""
        return self.weights + self.activations + self.snapshots + self.scratch + self.rounding


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of a call by stage: text, encode (image or video given), denoise, decode.

    `process`: what the process holds besides, on a CPU where a budget means its resident set: interpreter and
    libraries. On an accelerator 0: the driver's context (some 0.5 GB on CUDA) stands outside of all counts.
    """

    device: str
    stages: Mapping[str, Stage]
    weights: Mapping[str, int]
    """Bytes of each component's weights."""
    process: int = 0

    @property
    def binding(self) -> str:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda name: self.stages[name].total)

    @property
    def peak(self) -> int:
        """The most bytes held at once."""
        return self.stages[self.binding].total + self.process

    @property
    def activations(self) -> int:
        """The most bytes of activations and snapshots, of any stage."""
        return max(s.activations + s.snapshots for s in self.stages.values())

    @property
    def seconds(self) -> float:
        """Predicted time of the call."""
        return sum(s.seconds for s in self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        stages = {name: asdict(s) | {"parts": list(s.parts), "total": s.total} for name, s in self.stages.items()}
        head = {"device": self.device, "peak": self.peak, "binding": self.binding, "process": self.process}
        return head | {"weights": dict(self.weights), "stages": stages}


def estimate_peak(
    pipeline: Any,
    denoisers: tuple[DenoiserMap, ...],
    call: Mapping[str, Any],
    methods: Sequence[Method[Any]] = (),
    process: int = 0,
    most: int | None = None,
) -> Estimate:
    """The estimate of `pipeline(**call)` with these methods, bound already. Nothing is computed; takes some seconds.

    The call is traced on fake tensors of the sizes asked for, in the model's own dtype and with the attention kernel
    that the device would take. What tensors cannot show is added by the rules of `estimate_scratch`. Raises
    MemoryBudgetError for a call that cannot be traced, and MethodInapplicable beyond `most` traced operators.
    """
    device = torch.device(pipeline._execution_device)
    dtype = next(denoisers[0].module.parameters()).dtype
    tallies, weights = dry_run(pipeline, denoisers, methods, call, lambda: weight_bytes(pipeline, device), most)
    stages = {name: _stage(tally, weights, device, dtype) for name, tally in tallies.items()}
    return Estimate(str(device), stages, {name: size for name, (size, _) in weights.items()}, process)


def _stage(tally: Tally, weights: Mapping[str, tuple[int, bool]], device: torch.device, dtype: torch.dtype) -> Stage:
    here = sum(size for name, (size, resident) in weights.items() if resident or name in tally.parts)
    scratch = tally.with_scratch - tally.peak
    rounding = int((MARGIN.get(device.type, 1.0) - 1) * tally.with_scratch)
    return Stage(
        weights=here,
        activations=tally.peak - tally.snapshots,
        snapshots=tally.snapshots,
        scratch=scratch,
        rounding=rounding,
        operator=tally.at,
        parts=tuple(sorted(tally.parts)),
        calls=tally.calls,
        operators=tally.operators,
        seconds=seconds_of(tally, device, dtype),
    )


def weight_bytes(pipeline: Any, device: torch.device) -> dict[str, tuple[int, bool]]:
    """Bytes of each component's weights, and whether they stay on the device; shared storages count once."""
    seen: set[int] = set()
    found = {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            tensors = [*part.parameters(), *part.buffers()]
            new = {t.data_ptr(): t.nbytes for t in tensors}
            size = sum(n for key, n in new.items() if key not in seen)
            seen |= new.keys()
            found[name] = size, all(t.device.type == device.type for t in tensors)
    return found
