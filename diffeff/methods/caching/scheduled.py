"""ScheduledCache: plays a schedule that was searched for: which steps compute which branch, and how the rest is filled.

Steps are predicted after guidance, where the scheduler is handed its prediction: one tensor per computed step is held,
whatever the number of branches, and the present latents can take part in the prediction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method
from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.few_steps import caution
from diffeff.methods.caching.predictor import PREDICTORS, combine, time_axis
from diffeff.methods.guidance.branches import Rows, conditional_alone, halves

__all__ = ["ACTIONS", "DELTAS", "FITTED", "Entry", "ScheduledCache", "ScheduledCacheMethod", "entries_of"]

ACTIONS = ("both", "cond", "none")
"""What is computed at a step: both branches of guidance, the conditional one, or nothing."""
FITTED = "fitted"
DELTAS = 2
"""How many earlier guidance differences an estimated one may draw on."""


@dataclass(frozen=True, kw_only=True)
class ScheduledCache(Config):
    """The steps that matter most are computed, the rest is predicted: a schedule searched for on your model.

    `actions` says for every step of the run it was tuned on whether both branches of guidance are computed (`both`),
    only the conditional one (`cond`, the guidance difference is then a sum of the last two known ones and of the
    conditional prediction), or nothing (`none`, the guided prediction is then a weighted sum of the last computed ones
    and of the present latents, or what a named predictor gives). `sigmas` are the noise levels of these steps: at
    another number of steps the computed ones are the nearest in noise level, and fitted weights are interpolated.
    Without `sigmas` the actions are spread evenly over the run.

    Made by `diffeff tune` and `pipe.tune`, or from a `diffeff.search.schedule.Schedule`. Holds `depth` guided
    predictions, two guidance differences and one output per branch.

    Related: DPCache (arXiv 2602.22654), LeMiCa (2511.00090), MeanCache (2601.19961), L2P (2604.26365).
    """

    name: ClassVar[str] = "scheduled_cache"
    summary: ClassVar[str] = (
        "Computes the steps that matter most, as searched for on your model, and predicts the rest."
    )

    actions: tuple[str, ...] = knob((), "per step: both, cond or none")
    sigmas: tuple[float, ...] = knob((), "noise level of each step of the run it was tuned on")
    predictors: tuple[str, ...] = knob((), "per step with action none: a predictor's name, or fitted")
    weights: tuple[float, ...] = knob((), "per fitted step: weight of the latents, then of computed ones, oldest first")
    deltas: tuple[float, ...] = knob((), "per step with action cond: weights of known differences, then of cond")
    depth: int = knob(2, "computed predictions a fitted step draws on", low=1, high=8, step=1)

    def check(self) -> None:
        for action in self.actions:
            if action not in ACTIONS:
                raise ConfigError(f"scheduled_cache.actions holds {action!r}; allowed: {', '.join(ACTIONS)}")
        if self.actions and self.actions[0] != "both":
            raise ConfigError(f"scheduled_cache.actions begins with {self.actions[0]!r}; the first step must be 'both'")
        self._length("sigmas", len(self.actions))
        self._length("predictors", self.actions.count("none"))
        for name in self.predictors:
            if name != FITTED and name not in PREDICTORS:
                known = ", ".join([FITTED, *PREDICTORS])
                raise ConfigError(f"scheduled_cache.predictors holds {name!r}; allowed: {known}")
        fitted = [k for k, name in self.named().items() if name == FITTED]
        self._length("weights", sum(self.known(k) + 1 for k in fitted), needed=bool(fitted))
        self._length("deltas", sum(self.differences(k) + 1 for k in self._at("cond")))
        if any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ConfigError("scheduled_cache.sigmas must fall from one step to the next")

    def _length(self, field_: str, wanted: int, needed: bool = False) -> None:
        found = len(getattr(self, field_))
        if found != wanted and (found or needed):
            raise ConfigError(f"scheduled_cache.{field_} has {found} values; these actions need {wanted}")

    def _at(self, action: str) -> list[int]:
        return [k for k, found in enumerate(self.actions) if found == action]

    def known(self, step: int) -> int:
        """Computed predictions at hand for a fitted sum at `step`."""
        return min(self.depth, sum(action != "none" for action in self.actions[:step]))

    def differences(self, step: int) -> int:
        """Guidance differences at hand for an estimate at `step`."""
        return min(DELTAS, self.actions[:step].count("both"))

    def named(self) -> dict[int, str]:
        """Predictor of each skipped step; linear where none are given."""
        skipped = self._at("none")
        return dict(zip(skipped, self.predictors or ("linear",) * len(skipped), strict=True))

    def fitted_weights(self) -> dict[int, tuple[float, ...]]:
        """Weights of each fitted step: of the latents, then of the computed predictions, oldest first."""
        steps = [k for k, name in self.named().items() if name == FITTED]
        return _cut(self.weights, {k: self.known(k) + 1 for k in steps})

    def delta_weights(self) -> dict[int, tuple[float, ...]]:
        """Weights at each step without the unconditional branch; the last difference is held where none are given."""
        lengths = {k: self.differences(k) + 1 for k in self._at("cond")}
        if self.deltas:
            return _cut(self.deltas, lengths)
        return {k: (*(0.0,) * (n - 2), 1.0, 0.0) for k, n in lengths.items()}

    def build(self) -> ScheduledCacheMethod:
        return ScheduledCacheMethod(self)


def _cut(values: Sequence[float], lengths: Mapping[int, int]) -> dict[int, tuple[float, ...]]:
    pieces, start = {}, 0
    for step, length in lengths.items():
        pieces[step] = tuple(values[start : start + length])
        start += length
    return pieces


# --- the schedule on a run's own steps -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """What to do at one entry of a run: `weights` of a fitted prediction, `deltas` of an estimated difference."""

    action: str
    predictor: str = ""
    weights: tuple[float, ...] = ()
    deltas: tuple[float, ...] = ()


def entries_of(config: ScheduledCache, times: Sequence[float]) -> list[Entry]:
    """The schedule for a run whose entries stand at `times` (noise levels, falling).

    The entries it was tuned on get exactly what was tuned; for others the computed steps are the nearest ones, and
    weights are interpolated between the steps of the same gap.
    """
    places = _places(config, times)
    nearest = _nearest(config, places)
    own = {run: tuned for tuned, run in nearest.items()}
    deltas = config.delta_weights()
    computed = {run: config.actions[tuned] for run, tuned in own.items()}
    return [
        Entry(computed[r], deltas=deltas.get(own[r], ())) if r in own else _skipped(config, places[r], r, own)
        for r in range(len(times))
    ]


def _places(config: ScheduledCache, times: Sequence[float]) -> list[float]:
    """Where the entries of a run stand among the tuned steps, as fractional numbers of those."""
    last = len(config.actions) - 1
    if not config.sigmas or times[-1] >= times[0]:  # noise levels may repeat (Heun): the axis is then the entry
        return [float(p) for p in np.linspace(0, last, len(times))]
    rising = np.array(times[::-1]), np.array(config.sigmas[::-1])
    found = np.interp(rising[0], rising[1], np.arange(last, -1, -1.0))[::-1]
    return [float(round(p)) if abs(p - round(p)) < 1e-3 else float(p) for p in found]


def _nearest(config: ScheduledCache, places: Sequence[float]) -> dict[int, int]:
    """For each computed tuned step its entry of the run: rising, each used once."""
    wanted = [k for k, action in enumerate(config.actions) if action != "none"]
    found: dict[int, int] = {}
    free = 0
    for number, k in enumerate(wanted):
        last = len(places) - (len(wanted) - number)  # leave room for those to come
        choice = min(range(free, len(places)), key=lambda r: abs(places[r] - k), default=None)
        if choice is None:
            break
        choice = max(min(choice, last), free)
        found[k], free = choice, choice + 1
    return found


def _skipped(config: ScheduledCache, place: float, entry: int, own: Mapping[int, int]) -> Entry:
    """How an entry without a computed step is filled."""
    names, before = config.named(), max(tuned for run, tuned in own.items() if run < entry)
    after = next(
        (k for k in range(before + 1, len(config.actions)) if config.actions[k] != "none"), len(config.actions)
    )
    gap = [k for k in range(before + 1, after) if k in names]
    if not gap:
        return Entry("none", "linear")
    name = names[min(gap, key=lambda k: abs(k - place))]
    if name != FITTED:
        return Entry("none", name)
    weights = {k: w for k, w in config.fitted_weights().items() if k in gap}
    return Entry("none", FITTED, _interpolated(weights, before, place))


def _interpolated(weights: Mapping[int, tuple[float, ...]], before: int, place: float) -> tuple[float, ...]:
    """Weights at `place` of a gap that begins at the computed step `before`, where the newest one is simply held."""
    steps = sorted(weights)
    if place in weights:
        return weights[int(place)]
    held = (*(0.0,) * (len(weights[steps[0]]) - 1), 1.0)
    knots, values = [before, *steps], [held, *(weights[k] for k in steps)]
    upper = min(max(bisect_right(knots, place), 1), len(knots) - 1)
    share = (place - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
    pairs = zip(values[upper - 1], values[upper], strict=True)
    return tuple(a + share * (b - a) for a, b in pairs)


# --- the run ---------------------------------------------------------------------------------------------------------
@dataclass
class _Ledger:
    """What one run remembers."""

    entries: list[Entry]
    times: tuple[float, ...]
    computed: deque[tuple[int, Tensor]]
    """Guided predictions of computed steps, with their entries."""
    differences: deque[Tensor] = field(default_factory=lambda: deque(maxlen=DELTAS))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """The last output of each branch: what a skipped call answers, before the guided prediction is replaced."""
    cond: tuple[int, Tensor] | None = None
    predicted: list[int] = field(default_factory=list)
    halved: list[int] = field(default_factory=list)


class ScheduledCacheMethod(Method[ScheduledCache]):
    """Leaves denoiser calls out and hands the scheduler a predicted value."""

    layer: ClassVar[Layer] = Layer.GUIDANCE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_STEP, Claim.SKIP_BRANCH})

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if not self.config.actions:
            raise MethodInapplicable(
                "scheduled_cache has no actions: it has to be searched for on your model first. `diffeff tune MODEL` "
                "or pipe.tune(...) does that from a few prompts."
            )

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        counts = {action: self.config.actions.count(action) for action in ACTIONS}
        return (
            f"of {len(self.config.actions)} steps, {counts['both']} compute all of {denoiser.name}, {counts['cond']} "
            f"the conditional branch, {counts['none']} nothing"
        )

    def begin(self, run: Run) -> None:
        if run.clock.length != len(self.config.actions):  # at the steps it was tuned on it was measured
            caution(run)

    def _ledger(self, run: Run) -> _Ledger:
        return run.state(self, lambda: self._open(run), site="schedule", branch="")

    def _open(self, run: Run) -> _Ledger:
        times = time_axis(run.clock)
        used = [PREDICTORS[n].snapshots for n in {*self.config.named().values(), "linear"} - {FITTED}]
        depth = max([self.config.depth, *used])
        return _Ledger(entries_of(self.config, times), times, deque(maxlen=depth))

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        ledger, k = self._ledger(run), run.clock.index
        action, key = ledger.entries[k].action, call.branch  # two experts answer in one shape
        if action == "none" and key in ledger.outputs and ledger.computed:
            _note(ledger.predicted, k)
            return ledger.outputs[key].clone()  # pipelines may write into what they are given
        found = self._computed(run, ledger, call, proceed)
        ledger.outputs[key] = found.detach()
        return found

    def _computed(self, run: Run, ledger: _Ledger, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        k = run.clock.index
        halve = ledger.entries[k].action == "cond" and bool(ledger.differences)
        rows = run.guidance_rows(call) if call.branch == "both" else None
        if rows is not None:
            if not halve:
                return self._pair(ledger, call, rows, proceed)
            return conditional_alone(call, rows, proceed, lambda cond: self._estimate(ledger, k, cond))
        if call.branch != "uncond":
            found = proceed(call)
            ledger.cond = (k, found.detach()) if call.branch == "cond" else ledger.cond
            return found
        cond = ledger.cond[1] if ledger.cond is not None and ledger.cond[0] == k else None
        if cond is not None and halve:
            return self._estimate(ledger, k, cond)
        found = proceed(call)
        if cond is not None:
            ledger.differences.append(cond.float() - found.float())
        return found

    def _pair(self, ledger: _Ledger, call: StepCall, rows: Rows, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        both = proceed(call)
        uncond, cond = halves(both, rows)
        ledger.differences.append(cond.float() - uncond.float())
        return both

    def _estimate(self, ledger: _Ledger, k: int, cond: Tensor) -> Tensor:
        """The unconditional prediction that stands in: cond less the estimated difference."""
        _note(ledger.halved, k)
        known, weights = list(ledger.differences), ledger.entries[k].deltas
        known = known[-(len(weights) - 1) :]
        difference = combine([*known, cond.float()], weights[-len(known) - 1 :])
        return (cond.float() - difference).to(cond.dtype)

    def around_update(
        self, run: Run, prediction: Tensor, latents: Tensor, proceed: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        ledger, k = self._ledger(run), run.clock.index
        if k in ledger.predicted[-1:] and ledger.computed[-1][1].shape == prediction.shape:
            return proceed(self._predict(ledger, k, latents).to(prediction.dtype), latents)
        ledger.computed.append((k, prediction.detach().clone()))
        return proceed(prediction, latents)

    def _predict(self, ledger: _Ledger, k: int, latents: Tensor) -> Tensor:
        entry, held = ledger.entries[k], list(ledger.computed)
        wanted = len(entry.weights) - 1
        if entry.predictor == FITTED and 0 < wanted <= len(held):
            return combine([latents, *(x for _, x in held[-wanted:])], entry.weights)
        name = entry.predictor if entry.predictor != FITTED else "linear"
        predictor = PREDICTORS[name]
        axis = ledger.times if predictor.axis == "time" else tuple(float(i) for i in range(len(ledger.times)))
        held = held[-predictor.snapshots :]
        weights = predictor.coefficients([axis[i] for i, _ in held], axis[k])
        return combine([x for _, x in held], weights)

    # --- report -------------------------------------------------------------------------------------------------
    def _found(self, run: Run) -> _Ledger | None:
        return next((s for s in run.states(self).values() if isinstance(s, _Ledger)), None)

    def engaged(self, run: Run) -> tuple[bool, str]:
        ledger = self._found(run)
        if ledger is None:
            return False, "the denoiser was never reached"
        predicted, halved, length = len(ledger.predicted), len(ledger.halved), run.clock.length
        if predicted or halved:
            return True, f"{predicted} of {length} steps predicted, {halved} more without the unconditional branch"
        return False, f"nothing was skipped: at {length} steps the schedule computes all of them"

    def details(self, run: Run) -> Mapping[str, Any]:
        ledger = self._found(run)
        if ledger is None:
            return {}
        held = [*(x for _, x in ledger.computed), *ledger.differences, *ledger.outputs.values()]
        return {
            "predicted_steps": list(ledger.predicted),
            "halved_steps": list(ledger.halved),
            "bytes_held": sum(t.numel() * t.element_size() for t in held),
        }


def _note(steps: list[int], k: int) -> None:
    if k not in steps:
        steps.append(k)
