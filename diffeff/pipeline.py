"""DiffEffPipeline: a diffusers pipeline with a plan on it. Loads, wraps, applies, removes; delegates all else."""

from __future__ import annotations

import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DiffusionPipeline

from diffeff import loading
from diffeff.anatomy.table import denoisers
from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config
from diffeff.core.session import Session
from diffeff.errors import DiffEffError, DiffEffWarning, RunInProgress
from diffeff.memory import available_bytes, held_bytes, peak_memory
from diffeff.plan import Plan, check_methods
from diffeff.report import Report
from diffeff.stamp import stamp_of

if TYPE_CHECKING:
    from diffeff.core.method import Undo
    from diffeff.core.run import Run
    from diffeff.methods.memory.estimate import Estimate
    from diffeff.methods.memory.ladder import Rung
    from diffeff.methods.memory.planner import MemoryGoal, MemoryPlan
    from diffeff.methods.memory.recovery import MemoryKeeper
    from diffeff.search.points import Tuned

__all__ = ["DiffEffPipeline"]

log = logging.getLogger("diffeff")

# Calls that change modules, hooks or weights below our seams: the plan comes off before and goes back on after.
_REBUILDING = frozenset(
    {
        "to", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "remove_all_hooks",
        "load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "load_ip_adapter", "unload_ip_adapter",
        "enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention",
        "fuse_qkv_projections", "unfuse_qkv_projections", "register_modules", "delete_adapters",
        "load_textual_inversion", "enable_lora", "disable_lora", "set_adapters",
    }
)  # fmt: skip
_OWN = frozenset({"_pipe", "_session", "_plan", "_report", "_load_seconds", "_keeper", "_asked", "_actions"})
Planlike = Plan | Config | str | os.PathLike[str] | Iterable[Config]


class DiffEffPipeline:
    """Make a diffusers pipeline faster or smaller with a plan; everything else stays as diffusers has it.

    `DiffEffPipeline(pipe)` wraps a loaded pipeline; `DiffEffPipeline.from_pretrained(name)` loads a bundled model, a
    local folder or a hub id. Arguments, outputs, attributes and methods are those of the wrapped pipeline. While a
    plan is applied, `pipe.report` says after each call what was engaged and what it cost.
    """

    def __init__(self, pipe: Any, plan: Planlike | None = None, memory: MemoryGoal | str | int | None = None) -> None:
        if isinstance(pipe, DiffEffPipeline):
            pipe = pipe.wrapped
        if not isinstance(pipe, DiffusionPipeline):
            raise DiffEffError(
                f"DiffEffPipeline wraps a diffusers pipeline, not {type(pipe).__name__}. Load one with "
                "DiffEffPipeline.from_pretrained(name_or_folder)."
            )
        self._pipe: Any = pipe
        self._session: Session | None = None
        self._plan = Plan()
        self._report: Report | None = None
        self._load_seconds: float | None = None
        self._keeper: MemoryKeeper | None = None
        self._asked = Plan()
        self._actions: Undo | None = None
        if plan is not None or memory is not None:
            self.apply(() if plan is None else plan, memory=memory)

    # --- load and save ------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        plan: Planlike | None = None,
        memory: MemoryGoal | str | int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a bundled model by name, a local folder, or a hub id, and apply a plan and a memory budget.

        A folder written by `save_pretrained` brings its own plan unless `plan` is given. Only safetensors weights are
        read unless `use_safetensors=False`; no code from the model's folder runs unless `trust_remote_code` or
        `custom_pipeline` is given here. Other `kwargs` (dtype, revision, variant, ...) go to diffusers.
        Raises ModelLoadError or UnknownName.
        """
        start = time.perf_counter()
        pipe = loading.load(name, **kwargs)
        wrapped = cls(pipe)
        wrapped._load_seconds = time.perf_counter() - start
        saved = Path(name) / loading.PLAN_FILE
        if plan is None and saved.is_file():
            plan = Plan.load(saved)
        if plan is not None or memory is not None:
            wrapped.apply(() if plan is None else plan, memory=memory)
        return wrapped

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
        """Write a plain diffusers folder (unchanged weights) plus `diffeff_plan.json` and the plan's artefacts.

        Any diffusers can load the folder; `DiffEffPipeline.from_pretrained` of it restores the plan as well.
        """
        session = self._session
        artefacts = {} if session is None else {m.config.name: dict(m.artefacts()) for m in session.methods}
        with self._plan_off():
            plan = None if session is None else self._plan.stamped(stamp_of(self._pipe, session.denoisers))
            return loading.save(self._pipe, Path(folder), plan, artefacts, kwargs)

    # --- plan ---------------------------------------------------------------------------------------------------
    @property
    def wrapped(self) -> Any:
        """The diffusers pipeline itself."""
        return self._pipe

    @property
    def plan(self) -> Plan:
        """The plan that is applied; empty when none is."""
        return self._plan

    @property
    def denoisers(self) -> tuple[DenoiserMap, ...]:
        """Descriptions of the pipeline's denoisers. Raises UnsupportedModel for an unknown architecture."""
        return self._session.denoisers if self._session is not None else denoisers(self._pipe)

    @property
    def report(self) -> Report | None:
        """What the last call did; None before the first call with a plan."""
        return self._report

    def apply(self, plan: Planlike = (), *, memory: MemoryGoal | str | int | None = None) -> Self:
        """Put a plan on, in place of the present one: a Plan, configs, a preset's name or a plan file's path.

        Checks everything before anything is touched. Raises PlanConflict, MethodInapplicable, UnsupportedModel or
        ArtefactError with the old plan still in place.

        `memory`, such as "8GB", keeps every call within that many bytes in all: before a call of a new size the memory
        is estimated, and the cheapest steps that make it fit are added to the plan (docs/memory.md). A call that
        cannot fit raises MemoryBudgetError, with the numbers, before it starts.
        """
        chosen = Plan.of(plan)
        if self._session is not None and self._session.run is not None:
            raise RunInProgress("a plan cannot be changed while the pipeline is running")
        keeper = _keeper(memory)
        self._swap(chosen)
        self._drop_actions()
        self._asked, self._keeper = chosen, keeper
        return self

    def _swap(self, chosen: Plan) -> None:
        before = self._plan
        attached = self._session is not None
        self._detach()
        try:
            self._attach(chosen)
        except BaseException:
            if attached:
                self._attach(before)
            raise

    # --- memory budget ------------------------------------------------------------------------------------------
    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What `apply(..., memory=...)` decided for the last call: the steps, and the bytes predicted per stage."""
        return None if self._keeper is None else self._keeper.plan

    def plan_memory(self, memory: MemoryGoal | str | int, **call: Any) -> MemoryPlan:
        """How a call with these arguments would be made to fit `memory`, without running it or changing anything.

        Raises MemoryBudgetError, with the numbers, when it cannot fit.
        """
        from diffeff.methods.memory.planner import MemoryGoal

        return self._planned(MemoryGoal.of(memory), call)

    def estimate_memory(self, **call: Any) -> Estimate:
        """Peak bytes of each stage of a call with these arguments under the present plan, without running it."""
        from diffeff.methods.memory.estimate import estimate_peak

        with self._plan_off():
            here = self.denoisers
            methods = self._plan.build()
            for method in methods:
                method.bind(here)
            device = torch.device(self._pipe._execution_device)
            return estimate_peak(self._pipe, here, call, methods, _room(self._pipe, device)[0])

    def _planned(self, goal: MemoryGoal, call: Mapping[str, Any]) -> MemoryPlan:
        from diffeff.methods.memory.planner import plan_memory

        with self._plan_off():
            here = self.denoisers
            device = torch.device(self._pipe._execution_device)
            process, free = _room(self._pipe, device)
            asked = self._asked.methods if self._keeper is not None else self._plan.methods
            return plan_memory(self._pipe, here, asked, goal, call, check=check_methods, process=process, free=free)

    def _adopt(self, rung: Rung) -> None:
        """Put a step of the memory ladder on."""
        from diffeff.methods.memory.ladder import put_on

        self._detach()
        self._drop_actions()
        self._actions = put_on(self._pipe, rung.actions, torch.device(self._pipe._execution_device))
        self._attach(Plan(rung.methods, self._asked.model, self._asked.artefacts, self._asked.folder))

    def _drop_actions(self) -> None:
        undo, self._actions = self._actions, None
        if undo is not None:
            with self._plan_off():
                undo()

    def _last_run(self) -> Run | None:
        return None if self._session is None else self._session.last

    def tune(self, prompts: Sequence[Any], **options: Any) -> Tuned:
        """Find the fastest plan that keeps `min_psnr` dB to the plain run (or the most faithful one at `min_speedup`).

        `apply` the result's `plan`, and call with its `steps`. Options, cost and errors: `diffeff.search.tuner.tune`.
        """
        from diffeff.search.tuner import tune

        return tune(self, prompts, **options)

    def remove(self) -> Self:
        """Take the plan off: bit-identical to never having applied it. Calling it twice is harmless."""
        self._detach()
        self._drop_actions()
        self._plan = self._asked = Plan()
        self._keeper = None
        return self

    def _attach(self, plan: Plan) -> None:
        described = denoisers(self._pipe)
        methods = plan.build()
        for method in methods:
            method.bind(described)
        check_methods(methods, described)
        _compare_stamps(plan, self._pipe, described)
        for name, tensors in loading.artefacts(plan).items():
            for method in methods:
                if method.config.name == name:
                    method.load_artefacts(tensors)
        session = Session(self._pipe, described, methods)
        session.attach()
        self._session, self._plan = session, plan

    def _detach(self) -> None:
        if self._session is not None:
            self._session.detach()
            self._session = None

    @contextmanager
    def _plan_off(self) -> Iterator[None]:
        """The plan taken off for the length of a block, and put back on what is there then."""
        if self._session is None:
            yield
            return
        plan = self._plan
        self._detach()
        try:
            yield
        finally:
            self._attach(plan)

    # --- call ---------------------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline; same arguments and output as diffusers."""
        if self._session is None:
            return self._pipe(*args, **kwargs)
        if self._keeper is None:
            return self._run_attached(*args, **kwargs)
        call = inspect.signature(type(self._pipe).__call__).bind(self._pipe, *args, **kwargs).arguments
        result, notes = self._keeper.call(self, dict(list(call.items())[1:]))
        if self._report is not None:
            self._report = replace(self._report, warnings=(*self._report.warnings, *notes))
        return result

    def _run(self, call: Mapping[str, Any]) -> Any:
        return self._run_attached(**call)

    def _run_attached(self, *args: Any, **kwargs: Any) -> Any:
        if self._session is not None and self._session.outdated():
            with self._plan_off():  # the user put another denoiser in, or compiled this one: the plan follows
                log.info("a denoiser of %s was replaced or compiled; applying the plan anew", type(self._pipe).__name__)
        session = self._session
        if session is None:
            return self._pipe(*args, **kwargs)
        device = self._pipe._execution_device
        try:
            with peak_memory(torch.device(device)) as peak, session.managed_run():
                result = self._pipe(*args, **kwargs)
        finally:
            if session.last is not None:
                dtype = str(next(session.denoisers[0].module.parameters()).dtype).removeprefix("torch.")
                plan = f"{self._plan.digest}" if self._plan.methods else "empty"
                self._report = Report.of(
                    session, session.last, plan, self._load_seconds, peak.bytes, str(device), dtype
                )
        for text in self._report.warnings if self._report is not None else ():
            log.warning(text)
        return result

    # --- the wrapped pipeline's interface -----------------------------------------------------------------------
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The wrapped pipeline's class, so that isinstance, AutoPipeline and from_pipe see what they expect."""
        return type(self._pipe) if "_pipe" in vars(self) else DiffEffPipeline

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        value = getattr(self._pipe, name)
        if not callable(value) or getattr(value, "__self__", None) is not self._pipe:
            return value
        return self._delegate(name, value)

    def _delegate(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in _REBUILDING:
                with self._plan_off():
                    result = function(*args, **kwargs)
            else:
                result = function(*args, **kwargs)
            return self if result is self._pipe else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._pipe, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._pipe)})

    def __repr__(self) -> str:
        return f"DiffEffPipeline({type(self._pipe).__name__}, {self._plan})"


def _keeper(memory: MemoryGoal | str | int | None) -> MemoryKeeper | None:
    if memory is None:
        return None
    from diffeff.methods.memory.planner import MemoryGoal
    from diffeff.methods.memory.recovery import MemoryKeeper

    return MemoryKeeper(MemoryGoal.of(memory))


def _room(pipe: Any, device: torch.device) -> tuple[int, int | None]:
    """Bytes that the process holds besides the weights (0 but on a CPU), and bytes a call may hold in all."""
    from diffeff.methods.memory.estimate import weight_bytes

    held, free = held_bytes(device) or 0, available_bytes(device)
    total = None if free is None else held + free
    if device.type != "cpu":
        return 0, total
    weights = sum(size for size, here in weight_bytes(pipe, device).values() if here)
    return max(held - weights, 0), total


def _compare_stamps(plan: Plan, pipe: Any, described: tuple[DenoiserMap, ...]) -> None:
    if plan.model is None:
        return
    here = stamp_of(pipe, described)
    if here.fingerprint != plan.model.fingerprint:
        warnings.warn(
            f"this plan was made for another model: {plan.model.family} {plan.model.fingerprint}, applied to "
            f"{here.family} {here.fingerprint}. Its thresholds may not hold; tune it on this model.",
            DiffEffWarning,
            stacklevel=4,
        )
    if plan.model.scheduler is not None and here.scheduler != plan.model.scheduler:
        warnings.warn(
            f"this plan was made with the scheduler {plan.model.scheduler}; this pipeline has {here.scheduler}",
            DiffEffWarning,
            stacklevel=4,
        )
