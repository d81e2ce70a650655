"""What a cache remembers of one run: snapshots per branch, and the one decision per step that all branches share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from diffeff.core.run import Run, StepCall
from diffeff.methods.caching.indicator import Indicator
from diffeff.methods.caching.policy import Action, Policy, Situation
from diffeff.methods.caching.predictor import AnyPredictor, Axis, Grouped, Informed, Predictor, combine
from diffeff.methods.caching.ranks import Ranks
from diffeff.methods.caching.vault import Vault

__all__ = ["Moment", "Part", "Snapshot", "Statistics", "Track", "parts_of"]

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Moment:
    """One step as a cache sees it: the clock's entry, its time on the predictor's axis, and the entries around it."""

    index: int
    time: float
    done: int
    left: int
    sigmas: tuple[float, ...] = ()
    """Noise levels of the scheduler's whole list; empty where it has none."""
    next_time: float = float("nan")
    """Time of the next entry: where the scheduler takes the latents to."""

    @property
    def sigma(self) -> float:
        """The step's noise level; nan where the scheduler has none."""
        return self.sigmas[self.index] if self.sigmas else float("nan")

    def on(self, axis: Axis) -> float:
        """The step's place on a predictor's axis."""
        return {"time": self.time, "index": float(self.index), "sigma": self.sigma}[axis]


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a denoiser call: one branch, and one group of rows that decide together."""

    branch: str
    group: int
    start: int
    stop: int

    def of(self, x: Tensor, rows: int) -> Tensor:
        """This part of a tensor whose dimension 0 holds the call's `rows`, the same number of entries for each."""
        entries = x.shape[0] // rows
        return x[self.start * entries : self.stop * entries]


def parts_of(run: Run, call: StepCall, per_row: bool = False) -> list[Part]:
    """A call cut into its branches, in order of rows, and into single rows where these decide apart.

    A batched call is cut in two, so that history is shared with calls that bring one of its branches only.
    """
    halves = run.guidance_rows(call) if call.branch == "both" else None
    names = [call.branch]
    if halves is not None:
        names = ["uncond", "cond"] if int(halves[0][0]) == 0 else ["cond", "uncond"]
    size = call.rows // len(names)
    width = 1 if per_row else size
    return [
        Part(name, row if per_row else 0, n * size + row, n * size + row + width)
        for n, name in enumerate(names)
        for row in range(0, size, width)
    ]


@dataclass(eq=False)
class Snapshot:
    """Tensors computed at one step (a site may have several streams, some absent). A vault may move them."""

    moment: Moment
    tensors: Tensors
    aux: Tensor | None = None
    """What else was measured at that step, cheap enough to be measured at every step (a probe)."""

    def bytes_held(self) -> int:
        """Bytes of the tensors, wherever they are."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


@dataclass
class Statistics:
    """What the report tells of one denoiser."""

    computed: dict[str, float] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    changes: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def count(self, branch: str, index: int, computed: float) -> None:
        """One call of `branch` at step `index`, of which the share `computed` was computed."""
        self.computed[branch] = self.computed.get(branch, 0.0) + computed
        self.total[branch] = self.total.get(branch, 0) + 1
        if computed < 1:
            self.skipped.add(index)

    def to_dict(self) -> dict[str, Any]:
        changes = self.changes
        spread = {"min": min(changes), "median": median(changes), "max": max(changes)} if changes else None
        return {
            "computed": {k: round(v, 3) for k, v in self.computed.items()},
            "total": dict(self.total),
            "skipped_steps": sorted(self.skipped),
            "change": spread,
            "bytes_held": self.peak_bytes,
        }


@dataclass
class Track:
    """One group of rows in one denoiser: one decision per step, one history per branch.

    The first call of a step decides; the other branches follow, except that a branch without snapshots as recent as
    the last computed step is computed. So no branch starves the other, and none is predicted from older data.
    """

    policy: Policy
    predictor: AnyPredictor
    indicator: Indicator | None = None
    feedback: bool = False
    """Whether predictions join the history."""
    vault: Vault | None = None
    """What keeps the snapshots within a number of bytes."""
    ranks: Ranks | None = None
    """The processes that must decide alike."""
    histories: dict[str, deque[Snapshot]] = field(default_factory=dict)
    last: int | None = None
    """Entry of the last step that was decided to be computed, and was."""
    decided: int | None = None
    leader: str = ""
    action: Action = Action.COMPUTE
    computed: int = 0
    """Steps that were decided to be computed, and were."""
    left_at_first: int | None = None
    """Entries left at the first predicted step."""
    aux: dict[str, Tensor] = field(default_factory=dict)
    """The present step's probe, by branch."""
    _seen: Tensor | None = None

    def decide(self, at: Moment, branch: str, look: Callable[[], Tensor], statistics: Statistics) -> Action:
        """The step's decision, made once per step. `look` gives what the indicator looks at."""
        if self.decided == at.index:
            return self.action
        self._seen = None if self.indicator is None else look()
        change = None if self.indicator is None or self._seen is None else self.indicator.change(self._seen)
        if self.ranks is not None and self.last is not None and self.indicator is not None:
            change = self.ranks.largest(change)
        self.decided, self.leader = at.index, branch
        self.action = Action.COMPUTE if self.last is None else self.policy.decide(self._situation(at, change))
        if self.last is not None and change is not None:
            statistics.changes.append(change)
        if self.action is Action.PREDICT and self.left_at_first is None:
            self.left_at_first = at.left
        return self.action

    def _situation(self, at: Moment, change: float | None) -> Situation:
        since = 1 if self.last is None else max(at.index - self.last, 1)
        return Situation(at.done, at.left, since, change, at.index, at.sigmas, self.computed, self.left_at_first)

    def ready(self, branch: str) -> bool:
        """Whether the branch can be predicted from the last computed step or later."""
        history = self.histories.get(branch)
        return history is not None and self.last is not None and history[-1].moment.index >= self.last

    def predict(self, branch: str, at: Moment) -> Tensors:
        """The branch's tensors at `at`, new ones."""
        history = self.histories[branch]
        streams = zip(*(self._fetch(s) for s in history), strict=True)
        if isinstance(self.predictor, Grouped):
            found = tuple(_fill(self.predictor, list(history), stream, at) for stream in streams)
        else:
            aux = self.aux.get(branch)
            weights = self._weights(self.predictor, list(history), at, aux)
            if self.ranks is not None and aux is not None:  # measured weights: all tokens follow the same
                weights = self.ranks.mean(weights)
            found = tuple(_combine(stream, weights) for stream in streams)
        if self.feedback:
            self._keep(history, Snapshot(at, found))
        return found

    def _fetch(self, snapshot: Snapshot) -> Tensors:
        return snapshot.tensors if self.vault is None else self.vault.fetch(snapshot)

    def _keep(self, history: deque[Snapshot], new: Snapshot) -> None:
        """Append to the history in place of what it no longer has room for, or of the same step: the later counts."""
        old = None
        if history and history[-1].moment.index >= new.moment.index:
            old = history.pop()
        elif len(history) == history.maxlen:
            old = history.popleft()
        history.append(new)
        if self.vault is not None:
            self.vault.add(new, instead_of=old)
            self.vault.settle(self, self._fixed_bytes)

    @staticmethod
    def _weights(
        predictor: Predictor | Informed, history: list[Snapshot], at: Moment, aux: Tensor | None
    ) -> tuple[float, ...]:
        if isinstance(predictor, Informed):
            return predictor.weigh(history, at, aux)
        axis = predictor.axis
        return predictor.coefficients([s.moment.on(axis) for s in history], at.on(axis))

    def store(self, branch: str, at: Moment, x: Tensor, tensors: Tensors, output: Tensor | None = None) -> None:
        """The branch was computed: input `x` of the site, and what came out. `output` is what the indicator is told
        came out, where that is not the first of `tensors`."""
        history = self.histories.setdefault(branch, deque(maxlen=self.predictor.snapshots))
        self._keep(history, Snapshot(at, tensors, self.aux.get(branch)))
        if branch != self.leader or self.action is not Action.COMPUTE:
            return
        self.computed += self.last != at.index
        self.last = at.index
        if self.indicator is not None:
            self.indicator.computed(x if self._seen is None else self._seen, tensors[0] if output is None else output)
        self._seen = None

    def bytes_held(self) -> int:
        """Bytes of all snapshots that were not moved away, of their probes and of what the indicator holds."""
        return _bytes(self._snapshot_tensors()) + self._fixed_bytes()

    def _snapshot_tensors(self) -> list[Tensor]:
        here = [s for h in self.histories.values() for s in h if self.vault is None or self.vault.holds(s)]
        return [t for s in here for t in s.tensors if t is not None]

    def _fixed_bytes(self) -> int:
        """Bytes of probes and of what the indicator holds, without what snapshots hold anyway."""
        fixed = [s.aux for h in self.histories.values() for s in h if s.aux is not None]
        fixed += self.aux.values()
        fixed += [t for t in vars(self.indicator).values() if isinstance(t, Tensor)] if self.indicator else []
        known = {id(t) for t in self._snapshot_tensors()}
        return _bytes([t for t in fixed if id(t) not in known])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def _combine(stream: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    present = [x for x in stream if x is not None]
    return combine(present, weights) if len(present) == len(stream) else None


def _fill(
    predictor: Grouped, history: Sequence[Snapshot], stream: Sequence[Tensor | None], at: Moment
) -> Tensor | None:
    present = [x for x in stream if x is not None]
    return predictor.fill(history, present, at) if len(present) == len(stream) else None
