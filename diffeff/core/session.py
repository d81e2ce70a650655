"""A plan attached to a pipeline: installs the seams, opens and closes runs, and undoes all of it exactly."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from diffeff.anatomy.types import CFG, DenoiserMap
from diffeff.core.chains import nest, subscribers
from diffeff.core.clockwork import advance, seek, wind
from diffeff.core.handlers import (
    SegmentNotes,
    attention_handler,
    block_handler,
    linear_handler,
    module_handler,
    segment_handler,
)
from diffeff.core.method import Method
from diffeff.core.run import Run, StepCall
from diffeff.core.seams import Patch, Seam, own_tokens
from diffeff.core.strangers import refuse_strangers
from diffeff.errors import AttachedModelError, RunInProgress

__all__ = ["Session"]

log = logging.getLogger("diffeff")
_MARK = "_diffeff_session"
_BATCHED = (CFG.BATCHED_COND_FIRST, CFG.BATCHED_UNCOND_FIRST)


class Session:
    """Owns a pipeline's methods, already bound and checked, from attach to detach.

    `attach` rewrites, then installs seams; any exception unwinds all of it. `detach` is the exact inverse and may be
    called twice.
    """

    def __init__(self, pipeline: Any, denoisers: tuple[DenoiserMap, ...], methods: Sequence[Method[Any]]) -> None:
        self.pipeline = pipeline
        self.denoisers = denoisers
        self.methods = tuple(sorted(methods, key=lambda m: m.layer))
        self.run: Run | None = None
        self.last: Run | None = None
        """The run that closed last; its counts, warnings and times stay readable, its state is dropped."""
        self._patches: list[Patch] = []
        self._undo = ExitStack()
        self._scheduler: Any = None
        self._context: str | None = None
        self._notes = SegmentNotes()
        self._containers: dict[str, type] = {}
        self._callees = {d.name: getattr(pipeline, d.name) for d in denoisers}

    def outdated(self) -> bool:
        """Whether the pipeline has changed under the plan: another denoiser object, or one compiled since. Attaching
        anew puts the seams where they belong."""
        replaced = any(getattr(self.pipeline, d.name, None) is not c for d, c in self.callees())
        return replaced or any(patch.outdated() for patch in self._patches)

    def callees(self) -> list[tuple[DenoiserMap, Any]]:
        """Each denoiser with the object the pipeline called when the plan was attached (compiled wrappers included)."""
        return [(d, self._callees[d.name]) for d in self.denoisers]

    def entrance(self, callee: Any) -> Seam:
        """The seam through which the pipeline enters this denoiser while the plan is attached."""
        return next(patch.seam for patch in self._patches if patch.owner is callee and patch.name == "forward")

    # --- attach and detach --------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Rewrite and install. Raises PlanConflict or AttachedModelError with the model untouched."""
        refuse_strangers(self.pipeline, self.denoisers)
        for denoiser in self.denoisers:
            if _MARK in denoiser.module.__dict__:
                raise AttachedModelError(
                    f"{denoiser.name} already carries a diffeff plan (perhaps of another pipeline that shares it). "
                    "Call remove() there first, or use that DiffEffPipeline."
                )
        with ExitStack() as stack:
            self._install(stack)
            self._undo = stack.pop_all()
        names = ", ".join(m.config.name for m in self.methods) or "nothing"
        log.info("attached %s to %s (%s)", names, type(self.pipeline).__name__, self.denoisers[0].family)

    def detach(self) -> None:
        """Take everything off, last in first out. Raises ForeignPatchError, touching nothing, if someone patched on
        top of a seam."""
        if self.run is not None and self.run.managed:
            raise RunInProgress("the plan cannot be removed while the pipeline is running; interrupt the run first")
        for patch in self._patches:
            patch.check()
        self._close(None)
        self._undo.close()
        self._patches.clear()

    def _install(self, stack: ExitStack) -> None:
        for method in subscribers(self.methods, "rewrite_pipeline"):
            undo = method.rewrite_pipeline(self.pipeline)
            if undo is not None:
                stack.callback(undo)
        for denoiser in self.denoisers:
            self._mark(stack, denoiser.module)
            for method in self.methods:
                undo = method.rewrite(denoiser) if method.overriding("rewrite") else None
                if undo is not None:
                    stack.callback(undo)
        for denoiser in self.denoisers:
            self._install_blocks(stack, denoiser)
            self._install_denoiser(stack, denoiser)
        self.watch_scheduler()
        stack.callback(self._unwatch)

    def _mark(self, stack: ExitStack, module: nn.Module) -> None:
        module.__dict__[_MARK] = _Mark()
        stack.callback(module.__dict__.pop, _MARK)

    def _patch(self, stack: ExitStack, owner: object, name: str, handler: Any) -> None:
        patch = Patch(owner, name, handler)
        self._patches.append(patch)
        stack.callback(patch.undo)

    def _install_denoiser(self, stack: ExitStack, denoiser: DenoiserMap) -> None:
        callee = self._callees[denoiser.name]
        self._patch(stack, callee, "forward", lambda inner, a, k: self._on_step(denoiser, inner, a, k))
        if hasattr(denoiser.module, "cache_context"):
            self._patch(stack, denoiser.module, "cache_context", self._on_context)

    def _install_blocks(self, stack: ExitStack, denoiser: DenoiserMap) -> None:
        modules = dict(denoiser.module.named_modules())
        for method in subscribers(self.methods, "around_linear"):
            for path in method.linear_sites(denoiser):
                handler = linear_handler(self._present, path, modules[path], method)
                self._patch(stack, modules[path], "forward", handler)
        taps: dict[str, list[Method[Any]]] = {}
        for method in subscribers(self.methods, "around_attention"):
            for site in method.attention_sites(denoiser):
                taps.setdefault(site.name, []).append(method)
        for site in denoiser.attentions:
            if site.name in taps:
                self._patch(stack, site.module, "forward", attention_handler(self._present, site, taps[site.name]))
        for method in reversed(subscribers(self.methods, "around_module")):
            for whole in method.module_sites(denoiser):
                self._patch(stack, whole.module, "forward", module_handler(self._present, whole, method))
        for method in reversed(subscribers(self.methods, "around_block")):
            for block in method.block_sites(denoiser):
                self._patch(stack, own_tokens(block.module), "forward", block_handler(self._present, block, method))
        for method in self.methods:
            for segment in method.segments(denoiser):
                for block in segment.blocks:
                    self._patch(
                        stack,
                        own_tokens(block.module),
                        "forward",
                        segment_handler(self._present, self._notes, method, segment, block),
                    )

    def _present(self) -> Run | None:
        run = self.run
        return None if run is None or run.call is None else run

    # --- runs ---------------------------------------------------------------------------------------------------
    @contextmanager
    def managed_run(self) -> Iterator[Run]:
        """One call of the pipeline. Whatever ends it, all state is dropped."""
        if self.run is not None and self.run.managed:
            raise RunInProgress(
                f"this {type(self.pipeline).__name__} is already running. One pipeline runs one call at a time; load a "
                "second pipeline for concurrent calls."
            )
        self._close(None)
        refuse_strangers(self.pipeline, self.denoisers)
        for patch in self._patches:
            patch.check()
        self.watch_scheduler()
        run = self.run = self._fresh(managed=True)
        try:
            yield run
        except BaseException as error:
            self._close(error)
            raise
        self._close(None)

    def _fresh(self, managed: bool) -> Run:
        self._forget()
        return Run(type(self.pipeline).__name__, managed)

    def _forget(self) -> None:
        self._context = None
        self._notes.clear()

    def _close(self, error: BaseException | None) -> None:
        run, self.run = self.run, None
        if run is None:
            return
        self._forget()
        run.finished = time.perf_counter()
        try:
            for method in self.methods:
                if error is None:
                    run.outcomes[id(method)] = method.engaged(run)
                    run.details[id(method)] = dict(method.details(run))
                else:
                    run.outcomes[id(method)] = False, f"the run ended early: {type(error).__name__}"
                method.end(run, error)
        finally:
            run.drop()
            run.call = None
            self.last = run

    # --- scheduler ----------------------------------------------------------------------------------------------
    def watch_scheduler(self) -> None:
        """Put the clock on the pipeline's present scheduler (users swap schedulers between runs)."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        if scheduler is self._scheduler or scheduler is None:
            return
        self._unwatch()
        self._scheduler = scheduler
        self._clock_patches = [
            Patch(scheduler, "set_timesteps", self._on_set_timesteps, plain_copy=True),
            Patch(scheduler, "step", self._on_update, plain_copy=True),
        ]
        self._step_names = _parameters(self._clock_patches[1].seam.inner)

    def _unwatch(self) -> None:
        if self._scheduler is None:
            return
        for patch in self._clock_patches:
            patch.undo()
        self._scheduler = None

    def _on_set_timesteps(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = inner(*args, **kwargs)
        run = self.run
        if run is None or not run.managed:
            self._close(None)
            run = self.run = self._fresh(managed=False)
        run.drop()
        self._schedule(run)
        wind(run.clock, self._scheduler)
        return result

    def _schedule(self, run: Run) -> None:
        methods = subscribers(self.methods, "around_schedule")
        if not methods:
            return
        hooks = [lambda t, proceed, m=m: m.around_schedule(run, t, proceed) for m in methods]
        before = self._scheduler.timesteps
        after = nest(hooks, lambda t: t)(before)
        if after is not before:
            self._scheduler.timesteps = after

    def _on_update(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.run
        if run is None:
            return inner(*args, **kwargs)
        named = dict(zip(self._step_names, args, strict=False)) | kwargs
        prediction, latents = named.get("model_output"), named.get("sample")
        if isinstance(latents, Tensor):
            run.latent_rows = latents.shape[0]
        result = self._update(run, inner, named, prediction, latents)
        advance(run.clock, named.get("timestep"))
        run.ordinal = 0
        run.updated = time.perf_counter()
        if not run.managed and run.clock.index >= run.clock.total:
            self._close(None)
        return result

    def _update(self, run: Run, inner: Callable[..., Any], named: dict[str, Any], prediction: Any, latents: Any) -> Any:
        methods = subscribers(self.methods, "around_update")
        if not methods:
            return inner(**named)
        hooks = [lambda x, go, m=m: m.around_update(run, x[0], x[1], lambda p, s: go((p, s))) for m in methods]
        core = lambda x: inner(**(named | {"model_output": x[0], "sample": x[1]}))  # noqa: E731
        result = nest(hooks, core)((prediction, latents))
        if not isinstance(result, Tensor):
            return result
        return (result,) if named.get("return_dict") is False else SchedulerOutput(prev_sample=result)

    # --- step ---------------------------------------------------------------------------------------------------
    def _on_context(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._named_context(inner, args, kwargs)

    @contextmanager
    def _named_context(
        self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        self._context = str(args[0] if args else kwargs.get("name"))
        try:
            with inner(*args, **kwargs):
                yield
        finally:
            self._context = None

    def _on_step(
        self, denoiser: DenoiserMap, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        run = self.run
        if run is None or run.clock.timesteps is None or run.call is not None:
            return inner(*args, **kwargs)  # called outside a run of ours: plain
        call = self._open_call(run, denoiser, args, kwargs)
        raw: list[Any] = []
        try:
            with run.on_call(call):
                prediction = self._step_chain(run, call, inner, raw)
        finally:
            run.ordinal += 1
        return self._wrap(call, prediction, raw)

    def _open_call(self, run: Run, denoiser: DenoiserMap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        call = StepCall(denoiser, "cond", args, kwargs)
        seek(run.clock, self._scheduler, call.argument(denoiser.timestep))
        run.clock.index = min(run.clock.index, run.clock.total - 1)
        if run.first_call is None:
            run.first_call = time.perf_counter()
        if not run.begun:
            run.begun = True
            for method in self.methods:
                method.begin(run)
        sample = call.sample
        if denoiser.guided is not None:
            run.latent_rows = call.rows // 2 if denoiser.guided(call.arguments) else call.rows
        elif run.latent_rows is None and denoiser.cfg in _BATCHED:
            guided = getattr(self.pipeline, "do_classifier_free_guidance", None)
            if guided is not None:
                run.latent_rows = sample.shape[0] // 2 if guided and sample.shape[0] % 2 == 0 else sample.shape[0]
        branch = self._branch(run, call)
        run.guard_shape(denoiser.name, branch, (tuple(sample.shape), sample.dtype, sample.device))
        return StepCall(denoiser, branch, args, kwargs)

    def _branch(self, run: Run, call: StepCall) -> str:
        if call.denoiser.cfg in _BATCHED:
            if run.ordinal:
                return f"call{run.ordinal}"
            doubled = run.latent_rows is None or call.rows == 2 * run.latent_rows
            return "both" if doubled else "cond"
        if self._context is not None:
            return self._context
        text = call.argument(call.denoiser.text) if call.denoiser.text else None
        return run.branch_of(text.data_ptr() if isinstance(text, Tensor) else None)

    def _step_chain(self, run: Run, call: StepCall, inner: Callable[..., Any], raw: list[Any]) -> Tensor:
        def compute(c: StepCall) -> Tensor:
            with run.on_call(c):
                result = inner(*c.args, **c.kwargs)
            run.count_computed(call, c, len(c.denoiser.blocks))
            raw.append(result)
            prediction: Tensor = result[0]  # a tuple and diffusers' output classes both index their first field
            return prediction

        run.count_asked(call, len(call.denoiser.blocks))
        methods = subscribers(self.methods, "around_step")
        if not methods:
            return compute(call)
        hooks = [lambda c, proceed, m=m: _step_hook(run, m, c, proceed) for m in methods]
        prediction: Tensor = nest(hooks, compute)(call)
        return prediction

    def _wrap(self, call: StepCall, prediction: Tensor, raw: list[Any]) -> Any:
        """The prediction in the container the pipeline asked for; the model's own object where it is untouched."""
        for result in raw:
            if not isinstance(result, tuple):
                self._containers[call.denoiser.name] = type(result)
            if result[0] is prediction and len(raw) == 1:
                return result
        if call.argument("return_dict") is False:
            return (prediction,)
        container = self._containers.get(call.denoiser.name, Transformer2DModelOutput)  # all of them: one field, sample
        return container(sample=prediction)


class _Mark:
    """Marks a denoiser as taken. Copying or pickling the denoiser stumbles over it and says why."""

    def _refuse(self, *_: Any) -> Any:
        raise AttachedModelError(
            "a model cannot be copied or pickled while a diffeff plan is attached to it: the copy would share the "
            "state of this session. Call remove() on the DiffEffPipeline first."
        )

    __deepcopy__ = __reduce_ex__ = _refuse


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _step_hook(run: Run, method: Method[Any], call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
    with run.on_call(call):
        return method.around_step(run, call, proceed)
