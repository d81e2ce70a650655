"""A dry run of a pipeline: its own call at the requested size, in which every part is traced and nothing computed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.method import Method
from diffeff.core.seams import Seam
from diffeff.core.session import Session
from diffeff.errors import DiffEffError, MemoryBudgetError
from diffeff.methods.caching.cache import CacheMethod
from diffeff.methods.memory.estimate_ops import Tally, Watch
from diffeff.methods.memory.estimate_parts import StandIn, Tracer, plant

__all__ = ["dry_run"]

WeightT = TypeVar("WeightT")
_STATEFUL_STEPS = 3
"""Denoising steps traced for a method whose memory is not that of a cache recipe."""
_CODERS = {"encode": "encode", "decode": "decode"}
_DROPPED = ("callback", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator")


def dry_run(
    pipeline: Any,
    denoisers: tuple[DenoiserMap, ...],
    methods: Sequence[Method[Any]],
    call: Mapping[str, Any],
    weigh: Callable[[], WeightT],
    most: int | None = None,
) -> tuple[dict[str, Tally], WeightT]:
    """Bytes and work per stage of `pipeline(**call)` with these methods, bound already; and what `weigh` says while
    they are attached.

    The pipeline's Python runs as it is (tokenizers, scheduler, loops); its networks run on fake tensors at the call's
    shapes and answer zeros. Caches are made to compute every step, so that they fill up. The pipeline, its random
    state and its scheduler are as before afterwards. Tracing more than `most` operators raises MethodInapplicable.
    Raises MemoryBudgetError when the pipeline cannot be traced.
    """
    tracer = Tracer(most)
    with ExitStack() as stack:
        _spare(stack, pipeline)
        session = Session(pipeline, denoisers, [_filling(m) for m in methods])
        session.attach()
        stack.callback(session.detach)
        weights = weigh()
        _stand_in_for_parts(stack, tracer, session)
        try:
            with torch.random.fork_rng(devices=[]), Watch(tracer.ledger), session.managed_run():
                pipeline(**_quiet(pipeline, call))
        except DiffEffError:
            raise
        except Exception as error:
            raise MemoryBudgetError(
                f"the memory of {type(pipeline).__name__} cannot be estimated, because its call does not run on fake "
                f"tensors: {type(error).__name__}: {error}. Check the call's arguments; or leave memory= out."
            ) from error
        finally:
            tracer.ledger.live.close()
    return {name: tally for name, tally in tracer.ledger.stages.items() if tally.flops}, weights


def _spare(stack: ExitStack, pipeline: Any) -> None:
    """Let the dry run use up a copy of the scheduler, show no progress bar, and leave nothing in the modules (some
    autoencoders keep feature maps from one call to the next, transformers' encoders install hooks at their first)."""
    for part in pipeline.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            held = {name: copy.copy(v) for name, v in vars(module).items() if isinstance(v, dict | list)}
            stack.callback(_restore, module, dict(vars(module)), held)
        if isinstance(part, nn.Module):  # what the user has hooked up should not see a run of zeros
            vars(part).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is not None:
        pipeline.scheduler = copy.deepcopy(scheduler)
        stack.callback(setattr, pipeline, "scheduler", scheduler)
    if hasattr(pipeline, "set_progress_bar_config"):
        plant(stack, pipeline, "_progress_bar_config", {"disable": True})


def _restore(module: nn.Module, before: dict[str, Any], held: dict[str, Any]) -> None:
    """The same attributes, holding what they held."""
    if vars(module).keys() != before.keys() or any(vars(module)[k] is not v for k, v in before.items()):
        vars(module).clear()
        vars(module).update(before)
    for name, contents in held.items():
        if isinstance(contents, list):
            before[name][:] = contents
        elif before[name].keys() != contents.keys() or any(before[name][k] is not v for k, v in contents.items()):
            before[name].clear()
            before[name].update(contents)


def _quiet(pipeline: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in _DROPPED}


def _filling(method: Method[Any]) -> Method[Any]:
    if isinstance(method, CacheMethod):
        method.recipe = replace(method.recipe, cap=0)
    return method


def _steps(methods: Sequence[Method[Any]]) -> int:
    """Steps to trace until the methods hold all they ever hold, and one more."""
    caches = [m.recipe.predictor.snapshots + 1 for m in methods if isinstance(m, CacheMethod)]
    others = [_STATEFUL_STEPS for m in methods if not isinstance(m, CacheMethod) and m.overriding("around_step")]
    return max([1, *caches, *others])


def _stand_in_for_parts(stack: ExitStack, tracer: Tracer, session: Session) -> None:
    denoisers = {d.name for d in session.denoisers}
    for denoiser, callee in session.callees():
        stand_in = StandIn(tracer, denoiser.name, "denoise", _plain(callee, session.entrance(callee).inner))
        _watch_steps(stand_in, tracer, session)
        stack.enter_context(_leading_to(session.entrance(callee), stand_in))
    for name, part in session.pipeline.components.items():
        if isinstance(part, nn.Module) and name not in denoisers:
            _stand_in_for(stack, tracer, name, part)
    _stand_in_for_finish(stack, tracer, session.pipeline)


def _watch_steps(stand_in: StandIn, tracer: Tracer, session: Session) -> None:
    steps = _steps(session.methods)

    def again() -> bool:
        return session.run is not None and session.run.clock.updates < steps and steps > 1

    def note() -> None:
        held = 0 if session.run is None else session.run.bytes_held()
        stage = tracer.ledger.present
        stage.snapshots = max(stage.snapshots, held)

    stand_in.again, stand_in.done = again, note


def _stand_in_for(stack: ExitStack, tracer: Tracer, name: str, part: nn.Module) -> None:
    """Text and image encoders, ControlNets: their forward. Autoencoders: encode and decode."""
    coders = [method for method in _CODERS if callable(getattr(part, method, None))]
    if name.startswith(("vae", "vqvae", "image_decoder")) and coders:
        for method in coders:
            plant(stack, part, method, StandIn(tracer, name, _CODERS[method], getattr(part, method)))
        return
    stage = "denoise" if "controlnet" in name or "unet" in name or "transformer" in name else "text"
    plant(stack, part, "forward", StandIn(tracer, name, stage, _plain(part, part.forward)))
    if part.__dict__.get("_compiled_call_impl") is not None:
        plant(stack, part, "_compiled_call_impl", None)


def _stand_in_for_finish(stack: ExitStack, tracer: Tracer, pipeline: Any) -> None:
    """The way from latents to pixels, which holds several copies of a video."""
    if callable(getattr(pipeline, "decode_latents", None)):
        plant(stack, pipeline, "decode_latents", StandIn(tracer, "vae", "decode", pipeline.decode_latents))
    for owner, method in (("video_processor", "postprocess_video"), ("image_processor", "postprocess")):
        processor = getattr(pipeline, owner, None)
        inner = getattr(processor, method, None)
        if inner is not None:
            plant(stack, processor, method, StandIn(tracer, "vae", "decode", _as_tensor(inner)))


def _as_tensor(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The same, ending in a tensor: numpy knows no fake arrays."""

    def postprocess(*args: Any, **kwargs: Any) -> Any:
        kind = kwargs.get("output_type", "pt")
        return inner(*args, **(kwargs | {"output_type": kind if kind == "latent" else "pt"}))

    return postprocess


def _plain(part: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward below accelerate's hooks, which would move real weights; of a compiled module, the original's."""
    whole = getattr(part, "_orig_mod", None)
    if whole is not None or part.__dict__.get("_compiled_call_impl") is not None:
        found: Callable[..., Any] = (whole or part).forward
        return found
    return getattr(part, "_old_forward", forward) if hasattr(part, "_hf_hook") else forward


@contextmanager
def _leading_to(seam: Seam, inner: Any) -> Iterator[None]:
    before, seam.inner = seam.inner, inner
    try:
        yield
    finally:
        seam.inner = before
