"""The ladder of steps that lower a call's memory, the cheapest first, and putting one on a pipeline."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffeff.core.config import Config
from diffeff.core.method import Undo
from diffeff.methods.caching.recipe import CacheConfig
from diffeff.methods.memory.feature_slicing import FeatureSlicing
from diffeff.methods.quantization.int8_weights import Int8Weights

__all__ = ["ACTIONS", "Rung", "put_on", "rungs"]

ACTIONS = ("vae_tiling", "model_offload", "group_offload")
"""What a rung may switch on in diffusers itself."""


@dataclass(frozen=True)
class Rung:
    """One step of the ladder, with all that stands below it.

    `methods`: the whole plan at this step. `actions`: switches of diffusers, see ACTIONS. `exact`: whether results stay
    as they are but for rounding. `traced`: whether its memory must be traced anew, or follows from the step below.
    `tighter`: whether it only does more of what the step below does.
    """

    name: str
    methods: tuple[Config, ...]
    actions: tuple[str, ...] = ()
    exact: bool = True
    traced: bool = True
    tighter: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        methods = [m.to_dict() for m in self.methods]
        return {"step": self.name, "methods": methods, "actions": list(self.actions), "exact": self.exact}


def rungs(
    asked: Sequence[Config],
    budget: int,
    weights: int,
    *,
    accelerator: bool,
    slicing: bool = True,
    tiling: bool = True,
    quantization: bool = False,
) -> Iterator[Rung]:
    """The steps from the plan as asked upwards; each keeps what the ones before it did.

    `weights`: bytes of all weights, which slicing leaves. `slicing`, `tiling`: whether this pipeline knows them.
    Offload is for accelerators; int8 weights come last and only if allowed.
    """
    rung = Rung("as asked", tuple(asked))
    yield rung
    own = any(isinstance(m, FeatureSlicing) for m in asked)
    if slicing and not own:
        rung = replace(rung, name="feature slicing", methods=(*rung.methods, FeatureSlicing()))
        yield rung
    if slicing:
        for share in (1.0, 0.5, 0.25):
            left = int(share * max(budget - weights, 0))
            if left:
                rung = _sliced(rung, weights + left, share)
                yield rung
    if tiling:
        rung = replace(rung, name="VAE tiles", tighter=False, actions=("vae_tiling",), exact=False)
        yield rung
    if accelerator:
        yield from (rung := step for step in _off_the_device(rung))
    if quantization and not any(isinstance(m, Int8Weights) for m in asked):
        int8 = Int8Weights(keep_original="memory" if accelerator else "disk")
        yield replace(rung, name="int8 weights", methods=(*rung.methods, int8), exact=False, traced=False)


def _sliced(rung: Rung, limit: int, share: float) -> Rung:
    name = "feature slicing to the budget" if share == 1 else f"feature slicing to {share:g} of it"
    return replace(
        rung, name=name, methods=(*_whole(rung.methods), FeatureSlicing(memory=str(limit))), tighter=share < 1
    )


def _off_the_device(rung: Rung) -> Iterator[Rung]:
    """Snapshots, then the parts not in use, then the blocks not in use wait in host memory.

    Hooks that fetch a block stand in its own forward, which slicing replaces: the last step goes without slicing.
    """
    if any(isinstance(m, CacheConfig) for m in rung.methods):
        moved = (replace(m, cache_memory="1") if isinstance(m, CacheConfig) else m for m in rung.methods)
        rung = replace(rung, name="snapshots in host memory", methods=tuple(moved), traced=False)
        yield rung
    for action, name in (("model_offload", "parts in host memory"), ("group_offload", "blocks in host memory")):
        kept = tuple(a for a in rung.actions if a == "vae_tiling")
        methods = rung.methods if action == "model_offload" else _whole(rung.methods)
        rung = replace(rung, name=name, methods=methods, actions=(*kept, action), traced=False)
        yield rung


def _whole(methods: Sequence[Config]) -> tuple[Config, ...]:
    return tuple(m for m in methods if not isinstance(m, FeatureSlicing))


# --- putting a rung's actions on --------------------------------------------------------------------------------------
def put_on(pipeline: Any, actions: Sequence[str], device: torch.device) -> Undo:
    """Switch diffusers' own savers on; returns what switches them off again."""
    with ExitStack() as stack:
        for action in actions:
            {"vae_tiling": _tile, "model_offload": _offload_parts, "group_offload": _offload_blocks}[action](
                stack, pipeline, device
            )
        return stack.pop_all().close


def _tile(stack: ExitStack, pipeline: Any, device: torch.device) -> None:
    vae = pipeline.vae
    if not getattr(vae, "use_tiling", False):
        vae.enable_tiling()
        stack.callback(vae.disable_tiling)


def _offload_parts(stack: ExitStack, pipeline: Any, device: torch.device) -> None:
    stack.callback(pipeline.to, device)
    stack.callback(pipeline.remove_all_hooks)
    pipeline.enable_model_cpu_offload(device=device)


def _offload_blocks(stack: ExitStack, pipeline: Any, device: torch.device) -> None:
    from diffusers.hooks.group_offloading import apply_group_offloading

    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    stack.callback(pipeline.to, device)
    for module in modules:
        stack.callback(_unhook, module)
        apply_group_offloading(
            module,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )


def _unhook(module: nn.Module) -> None:
    """Take diffusers' group offload off, which has no switch of its own for that."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is None:
            continue
        for name in ("lazy_prefetch_group_offloading", "layer_execution_tracker", "group_offloading"):
            registry.remove_hook(name, recurse=False)
        if not registry.hooks:
            del part._diffusers_hook
            if part.__dict__.get("forward") == types.MethodType(type(part).forward, part):
                del part.forward
