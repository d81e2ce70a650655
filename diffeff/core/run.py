"""One call of a pipeline: its clock, its branches, and everything it remembers.

All state that methods keep lives here, keyed by (method, branch, site), and dies with the run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffeff.anatomy.types import CFG, DenoiserMap

__all__ = ["Clock", "Counts", "Run", "StepCall"]

StateT = TypeVar("StateT")


@dataclass(frozen=True)
class StepCall:
    """One call of a denoiser. `branch` is cond, uncond, both, or callN where the pipeline makes more than two."""

    denoiser: DenoiserMap
    branch: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, name: str) -> Any:
        return self.denoiser.argument(name, self.args, self.kwargs)

    @property
    def arguments(self) -> dict[str, Any]:
        """All given arguments by name."""
        return dict(zip(self.denoiser.signature, self.args, strict=False)) | dict(self.kwargs)

    @property
    def sample(self) -> Tensor:
        """The latents (already scaled) this call denoises; dimension 0 is the batch."""
        tensor = self.argument(self.denoiser.sample)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.denoiser.name} was called without {self.denoiser.sample!r}")
        return tensor

    @property
    def rows(self) -> int:
        return self.sample.shape[0]

    def take(self, rows: Tensor) -> StepCall:
        """The same call on some of its batch rows only. `rows`: 1-D int64 indices into dimension 0 of `sample`."""
        named = self.arguments
        for name in self.denoiser.rows:
            if named.get(name) is not None:
                named[name] = _take(named[name], rows, self.rows)
        return replace(self, args=(), kwargs=named)


def _branches(call: StepCall) -> tuple[str, ...]:
    return ("cond", "uncond") if call.branch == "both" else (call.branch,)


def _take(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, Mapping):
        return {k: _take(v, rows, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(v, rows, batch) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % batch or value.shape[0] == 0:
        return value
    per_row = value.reshape(batch, value.shape[0] // batch, *value.shape[1:])
    return per_row.index_select(0, rows.to(value.device)).flatten(0, 1)


@dataclass
class Clock:
    """Where the run is: taken from the scheduler, never from counting forwards.

    `index` counts entries of the scheduler's timestep list (a two-evaluation scheduler such as Heun has two per
    step), `total` is that list's length, `first` the entry the run began at (img2img starts late).
    """

    index: int = 0
    total: int = 0
    first: int = 0
    timesteps: Tensor | None = None
    sigmas: Tensor | None = None
    updates: int = 0

    @property
    def left(self) -> int:
        """Entries that remain after the present one."""
        return self.total - 1 - self.index

    @property
    def done(self) -> int:
        """Entries of this run before the present one."""
        return self.index - self.first

    @property
    def length(self) -> int:
        """Entries of this run."""
        return self.total - self.first

    @property
    def fraction(self) -> float:
        """Progress of this run in [0, 1): 0 at its first step."""
        return self.done / max(self.length, 1)

    @property
    def timestep(self) -> float:
        if self.timesteps is None:
            raise RuntimeError("no timesteps are set yet")
        return float(self.timesteps[min(self.index, self.total - 1)])

    @property
    def sigma(self) -> float:
        """Noise level of the present step on the scheduler's own scale; nan where the scheduler has none."""
        if self.sigmas is None:
            return float("nan")
        return float(self.sigmas[min(self.index, len(self.sigmas) - 1)])


@dataclass
class Counts:
    """How much of something was computed out of how much. Fractions arise when only some batch rows are computed."""

    computed: float = 0.0
    total: int = 0


@dataclass
class Run:
    """One call of the pipeline. Opened and closed by the session; methods read the clock and keep state here."""

    pipeline: str
    managed: bool
    clock: Clock = field(default_factory=Clock)
    branch: str = "cond"
    call: StepCall | None = None
    """The denoiser call in progress."""
    latent_rows: int | None = None
    """Batch rows of the latents, without the doubling of batched guidance; known after the first update or when the
    denoiser is first called outside guidance."""
    steps: dict[str, Counts] = field(default_factory=dict)
    """Denoiser calls computed of total, per branch."""
    blocks: dict[str, Counts] = field(default_factory=dict)
    """Blocks computed of total, per branch."""
    warnings: list[str] = field(default_factory=list)
    outcomes: dict[int, tuple[bool, str]] = field(default_factory=dict)
    """What each method said it did, by id of the method; filled when the run closes."""
    details: dict[int, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    first_call: float | None = None
    """Time of the first denoiser call; the stage before it is encoding."""
    updated: float | None = None
    """Time of the last scheduler update; the stage after it is decoding."""
    finished: float | None = None
    ordinal: int = 0
    """Denoiser calls since the last update of the latents."""
    begun: bool = False
    _states: dict[tuple[int, str, str], Any] = field(default_factory=dict)
    _shapes: dict[tuple[str, str], Any] = field(default_factory=dict)
    _texts: dict[int, str] = field(default_factory=dict)
    _skipped: float = 0.0

    def state(self, owner: object, make: Callable[[], StateT], site: str = "", branch: str | None = None) -> StateT:
        """The state of `owner` for one site and one branch (the present one unless named), made on first use."""
        key = (id(owner), self.branch if branch is None else branch, site)
        if key not in self._states:
            self._states[key] = make()
        found: StateT = self._states[key]
        return found

    def states(self, owner: object) -> dict[tuple[str, str], Any]:
        """All states of `owner` by (branch, site)."""
        return {key[1:]: value for key, value in self._states.items() if key[0] == id(owner)}

    def drop(self) -> None:
        """Forget everything methods remembered."""
        self._states.clear()
        self._shapes.clear()
        self._texts.clear()
        self.begun = False

    @contextmanager
    def on_call(self, call: StepCall) -> Iterator[None]:
        """Make `call` the one in progress: `run.call` and `run.branch` follow it, and come back afterwards.

        A method that computes only some rows of a batched-guidance call names the branch of those rows this way
        (`dataclasses.replace(call, branch="cond")`), so that state further in is kept apart.
        """
        before = self.call, self.branch
        self.call, self.branch = call, call.branch
        try:
            yield
        finally:
            self.call, self.branch = before

    def guard_shape(self, denoiser: str, branch: str, shape: Any) -> None:
        """Drop all state when a branch changes shape, dtype or device in mid-run."""
        known = self._shapes.setdefault((denoiser, branch), shape)
        if known != shape:
            self._states.clear()
            self._shapes = {(denoiser, branch): shape}
            self.warn(f"{denoiser} changed its input from {known[0]} to {shape[0]} in mid-run: history dropped")

    def branch_of(self, text: int | None) -> str:
        """Branch of a separate guidance call, by the identity of its text embedding, else by order in the step.

        Pipelines encode each prompt once and pass the same tensor every step, conditional first.
        """
        order = ("cond", "uncond")
        if text is None:
            return order[self.ordinal] if self.ordinal < 2 else f"call{self.ordinal}"
        if text not in self._texts:
            n = len(self._texts)
            self._texts[text] = order[n] if n < 2 else f"call{n}"
        return self._texts[text]

    def count_asked(self, call: StepCall, blocks: int) -> None:
        """A denoiser call came in."""
        for branch in _branches(call):
            self.steps.setdefault(branch, Counts()).total += 1
            self.blocks.setdefault(branch, Counts()).total += blocks

    def count_computed(self, asked: StepCall, done: StepCall, blocks: int) -> None:
        """Of the call `asked`, the rows of `done` went through the denoiser."""
        parts = len(_branches(asked)) / len(_branches(done))
        share = parts * done.rows / asked.rows
        for branch in _branches(done):
            self.steps.setdefault(branch, Counts()).computed += share
            self.blocks.setdefault(branch, Counts()).computed += share * (blocks - self._skipped)
        self._skipped = 0

    def count_skipped_block(self, share: float = 1.0) -> None:
        """One block of the call in progress was predicted, or a share of one."""
        self._skipped += share

    def warn(self, message: str) -> None:
        """Put a warning in the report, once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def bytes_held(self) -> int:
        """Bytes of tensors held in states (lists, tuples, queues, dicts, dataclass fields and Streams), each once."""
        found = {id(t): t for value in self._states.values() for t in _tensors(value)}
        return sum(t.numel() * t.element_size() for t in found.values())

    def guidance_rows(self, call: StepCall) -> tuple[Tensor, Tensor] | None:
        """(unconditional, conditional) row indices of a batched-guidance call; None when the call has one branch.

        Needs the latents' own batch size, which is known from the first scheduler update on.
        """
        if self.latent_rows is None or call.rows != 2 * self.latent_rows:
            return None
        first, second = torch.arange(call.rows).chunk(2)
        if call.denoiser.cfg is CFG.BATCHED_UNCOND_FIRST:
            return first, second
        return (second, first) if call.denoiser.cfg is CFG.BATCHED_COND_FIRST else None


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth > 8:
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple | deque):
        value = list(vars(value).values()) if isinstance(getattr(value, "__dict__", None), dict) else []
    for inner in value:
        yield from _tensors(inner, depth + 1)
