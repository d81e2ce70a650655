"""What the steps of the ladder that move weights away leave on the device, by rule, from a traced estimate.

Parts in host memory: the parts of a stage are on the device together, the others are not. Blocks in host memory: of the
denoiser two blocks at a time, and what is in no block. Int8 weights: a byte each and four per output of a layer.
Transfers are taken at 12 GB/s (PCIe 4.0 x16, memory that is not pinned), none of them hidden behind work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.method import Claim
from diffeff.methods.memory.estimate import Estimate, Stage
from diffeff.methods.memory.ladder import Rung
from diffeff.methods.quantization.int8_weights import Int8Weights

__all__ = ["LINK", "follow"]

LINK = 12e9
"""Bytes a second between host and device."""


def follow(rung: Rung, traced: Sequence[Estimate], denoisers: tuple[DenoiserMap, ...]) -> Estimate:
    """The estimate of a step that is not traced, from those before it: the first is of the plan as asked."""
    if "group_offload" in rung.actions:
        found = _offloaded(traced[0], _blocks_left(traced[0].weights, denoisers), by_call=True)
    elif "model_offload" in rung.actions:
        found = _offloaded(traced[-1], traced[-1].weights, by_call=False)
    else:
        found = traced[-1]
    if any(getattr(m, "cache_memory", "") for m in rung.methods):
        found = _each(found, _without_snapshots)
    int8 = next((m for m in rung.methods if isinstance(m, Int8Weights)), None)
    return found if int8 is None else _quantised(found, int8, denoisers)


def _each(estimate: Estimate, change: Callable[[Stage], Stage]) -> Estimate:
    return replace(estimate, stages={name: change(stage) for name, stage in estimate.stages.items()})


def _without_snapshots(stage: Stage) -> Stage:
    moved = 2 * stage.snapshots * stage.calls
    return replace(stage, snapshots=0, seconds=stage.seconds + moved / LINK)


def _offloaded(estimate: Estimate, weights: Mapping[str, int], by_call: bool) -> Estimate:
    def change(stage: Stage) -> Stage:
        here = sum(weights[part] for part in stage.parts)
        moved = sum(estimate.weights[part] for part in stage.parts) * (stage.calls if by_call else 1)
        return replace(stage, weights=here, seconds=stage.seconds + moved / LINK)

    return _each(estimate, change)


def _blocks_left(weights: Mapping[str, int], denoisers: tuple[DenoiserMap, ...]) -> dict[str, int]:
    left = dict(weights)
    for denoiser in denoisers:
        blocks = sorted((_bytes(block.module) for block in denoiser.blocks), reverse=True)
        left[denoiser.name] = weights[denoiser.name] - sum(blocks) + sum(blocks[:2])
    return left


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _quantised(estimate: Estimate, config: Int8Weights, denoisers: tuple[DenoiserMap, ...]) -> Estimate:
    saved = {d.name: _saved(config, d) for d in denoisers}

    def change(stage: Stage) -> Stage:
        resident = stage.parts if stage.weights < sum(estimate.weights.values()) else tuple(saved)
        return replace(stage, weights=stage.weights - sum(saved.get(part, 0) for part in resident))

    return _each(estimate, change)


def _saved(config: Int8Weights, denoiser: DenoiserMap) -> int:
    modules = dict(denoiser.module.named_modules())
    paths = config.build().claimed(denoiser)[Claim.LINEAR_WEIGHTS]
    weights = [modules[path].weight for path in paths]
    return sum(w.nbytes - w.numel() - 4 * w.shape[0] for w in weights)
