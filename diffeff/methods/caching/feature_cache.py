"""FeatureCache: predict some denoiser calls, or a run of their blocks, from earlier steps instead of computing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, Segment, Streams
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method
from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.indicator import Indicator, InputChange, TransformRate
from diffeff.methods.caching.policy import Action, Cap, FirstOf, Interval, Policy, Threshold, Window
from diffeff.methods.caching.predictor import PREDICTORS, Predictor, time_axis
from diffeff.methods.caching.track import Moment, Part, Statistics, Track, parts_of

__all__ = ["FeatureCache"]

_THRESHOLD_CAP = 4


@dataclass(frozen=True, kw_only=True)
class FeatureCache(Config):
    """Fewer denoiser evaluations: some steps are predicted from the steps before them.

    `site="step"` predicts the denoiser's output. It fits every model, saves the whole call and holds one or two
    latents per branch. `site="segment"` still runs the outer blocks on every step and predicts what the blocks between
    them add (transformers) or put out (the deep part of a UNet): it saves less per step and holds one or two feature
    maps per stream and branch, but follows the present latents and text, and what ControlNets add between blocks.

    `policy="interval"` computes every `interval`-th step. `policy="threshold"` computes when an indicator reaches
    `threshold`; a threshold of 0 never skips. At the step site the indicator is the estimated relative L1 change of
    the prediction since the last computed step (0.05 is 5 %), from the latents alone (transform rate). At the segment
    site it is the relative L1 change of the image stream that enters the segment against the last computed step. It
    reads a few numbers back from the device per step. The report gives the observed values, to choose a threshold by.

    `predictor="hold"` repeats the last computed prediction (step), residual or output (segment). `"linear"`,
    `"quadratic"` and `"cubic"` extrapolate the last two, three or four over sigma (over the timestep or the index where
    sigmas repeat) and hold as many in memory; `"damped"` goes half of linear's way. `"taylor"` (TaylorSeer, order 2),
    `"hermite"` (HiCache) and `"chebyshev"` (Spectrum, with constants kept exact) are the published forms. Sums are
    taken in float32.

    All guidance branches of a step follow one decision, each with its own history; so do all batch rows, unless
    `per_row`. Two experts (Wan 2.2) share nothing. `interval=1` is bit-exact. Useful from about 10 steps up; `begin`
    raises ConfigError when all steps are protected.

    Sources: First-Block Cache (ParaAttention), DeepCache (arXiv 2312.00858), EasyCache (arXiv 2507.02860), TaylorSeer
    (arXiv 2503.06923, order 1).
    """

    name: ClassVar[str] = "feature_cache"
    summary: ClassVar[str] = "Fewer denoiser evaluations: some steps are predicted from the steps before them."

    site: Literal["step", "segment"] = knob("step", "what is predicted: the whole denoiser call, or its inner blocks")
    policy: Literal["interval", "threshold"] = knob("interval", "when to compute: every n-th step, or on change")
    interval: int = knob(2, "compute every n-th step (policy=interval); 1 is exact", low=1, high=16, step=1)
    threshold: float = knob(
        0.1, "compute when the change reaches this (policy=threshold); 0 is exact", low=0.0, high=10.0, step=0.01
    )
    predictor: Literal["hold", "linear", "quadratic", "cubic", "damped", "taylor", "hermite", "chebyshev"] = knob(
        "linear", "repeat the last computed step, or extrapolate the last ones"
    )
    first: int = knob(3, "first steps that are always computed", low=0, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    max_skips: int | None = knob(
        None, "most steps predicted in a row; none: interval - 1, and 4 with a threshold", low=0, step=1
    )
    head: int = knob(1, "first blocks always computed (segment site of transformers)", low=0, step=1)
    tail: int = knob(0, "last blocks always computed (segment site of transformers)", low=0, step=1)
    depth: int = knob(1, "outermost levels always computed (segment site of UNets)", low=1, step=1)
    per_row: bool = knob(False, "let every image or video of a batch decide apart (step site only)")

    def check(self) -> None:
        if self.per_row and self.site == "segment":
            raise ConfigError(
                "feature_cache.per_row is True at site='segment': the rows of a batch go through the blocks together "
                "and cannot be skipped apart. Use per_row=True with site='step', or batches of one."
            )

    def build(self) -> CacheMethod:
        return StepCache(self) if self.site == "step" else SegmentCache(self)

    @property
    def exact(self) -> bool:
        """Whether these options never skip anything."""
        never = self.interval == 1 if self.policy == "interval" else self.threshold == 0
        return never or self.max_skips == 0


@dataclass
class _Ledger:
    """What one denoiser's cache remembers in one run: tracks by group of rows."""

    tracks: dict[int, Track] = field(default_factory=dict)
    sizes: set[torch.Size] = field(default_factory=set)
    """Sizes at which a segment was computed: stand-ins for skipped UNet blocks need one computed at their size."""
    statistics: Statistics = field(default_factory=Statistics)

    def weigh(self) -> None:
        held = sum(track.bytes_held() for track in self.tracks.values())
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, held)


class CacheMethod(Method[FeatureCache]):
    """What both sites share: the policy, the tracks and the report."""

    def _policy(self) -> Policy:
        config = self.config
        by_interval = config.policy == "interval"
        main: Policy = Interval(config.interval) if by_interval else Threshold(config.threshold)
        cap = (config.interval - 1 if by_interval else _THRESHOLD_CAP) if config.max_skips is None else config.max_skips
        return FirstOf((Window(config.first, config.last), Cap(cap), main))

    def _predictor(self) -> Predictor:
        return PREDICTORS[self.config.predictor]

    def _indicator(self) -> Indicator:
        raise TypeError(f"{type(self).__name__} has no indicator for policy='threshold'")

    def begin(self, run: Run) -> None:
        config, length = self.config, run.clock.length
        if length <= config.first + config.last and not config.exact:
            raise ConfigError(
                f"feature_cache: {length} steps are too few for a cache, because first={config.first} and "
                f"last={config.last} are always computed. Run at least {config.first + config.last + 2} steps, lower "
                "first or last, or leave the cache out (few-step models gain nothing from it)."
            )

    def _ledger(self, run: Run, denoiser: str) -> _Ledger:
        return run.state(self, _Ledger, site=denoiser, branch="")

    def _track(self, ledger: _Ledger, group: int) -> Track:
        if group not in ledger.tracks:
            indicator = self._indicator() if self.config.policy == "threshold" else None
            ledger.tracks[group] = Track(self._policy(), self._predictor(), indicator)
        return ledger.tracks[group]

    def _moment(self, run: Run) -> Moment:
        clock = run.clock
        axis = run.state(self, lambda: time_axis(clock), site="time axis", branch="")
        return Moment(clock.index, axis[clock.index], clock.done, clock.left)

    def _to_compute(self, ledger: _Ledger, parts: list[Part], at: Moment, look: Callable[[Part], Tensor]) -> list[Part]:
        """The parts of a call that must be computed. `look` gives what the indicator sees of a part."""
        for part in sorted(parts, key=lambda p: p.branch != "cond"):  # the conditional branch leads where it is there
            self._track(ledger, part.group).decide(at, part.branch, look(part), ledger.statistics)
        return [p for p in parts if self._must_compute(ledger.tracks[p.group], p)]

    @staticmethod
    def _must_compute(track: Track, part: Part) -> bool:
        return track.action is Action.COMPUTE or not track.ready(part.branch)

    # --- report -------------------------------------------------------------------------------------------------
    def _ledgers(self, run: Run) -> dict[str, _Ledger]:
        return {site: s for (_, site), s in run.states(self).items() if isinstance(s, _Ledger)}

    def engaged(self, run: Run) -> tuple[bool, str]:
        found = [ledger.statistics for ledger in self._ledgers(run).values()]
        skipped = {index for s in found for index in s.skipped}
        if skipped:
            what = "steps" if self.config.site == "step" else "steps' inner blocks"
            rows = " (in some rows of the batch)" if self.config.per_row else ""
            return True, f"{len(skipped)} of {run.clock.length} {what} predicted{rows}"
        return False, self._idle_reason([c for s in found for c in s.changes], bool(found))

    def _idle_reason(self, changes: list[float], called: bool) -> str:
        config = self.config
        if not called:
            return "the site was never reached"
        if config.exact:
            return "nothing was skipped, as asked: these options compute every step"
        if config.policy == "threshold" and changes:
            spread = Statistics(changes=changes).to_dict()["change"]
            seen = f"min {spread['min']:.3g}, median {spread['median']:.3g}, max {spread['max']:.3g}"
            if config.threshold <= spread["min"]:
                return f"nothing was skipped: threshold {config.threshold:g} is below every observed change ({seen})"
            return f"nothing was skipped: the smaller changes fell on protected steps (observed: {seen})"
        return "nothing was skipped: no step was left between the protected ones"

    def details(self, run: Run) -> Mapping[str, Any]:
        found = {name: ledger.statistics.to_dict() for name, ledger in self._ledgers(run).items()}
        return {**found, "decided": "rows apart" if self.config.per_row else "batch together"} if found else {}


class StepCache(CacheMethod):
    """Predicts the denoiser's output."""

    layer: ClassVar[Layer] = Layer.STEP
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_STEP})

    def inspect(self, denoiser: DenoiserMap) -> str:
        return f"whole calls of {denoiser.name} can be predicted"

    def _indicator(self) -> Indicator:
        return TransformRate()

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        ledger, at = self._ledger(run, call.denoiser.name), self._moment(run)
        parts, rows, sample = parts_of(run, call, self.config.per_row), call.rows, call.sample
        todo = self._to_compute(ledger, parts, at, lambda part: part.of(sample, rows))
        _count(ledger.statistics, parts, todo, at)
        asked = call if len(todo) == len(parts) else _only(call, todo)
        output = proceed(asked) if todo else None
        fresh = {} if output is None else _scatter(output, todo)
        for part, piece in fresh.items():
            held = piece.detach().clone()  # pipelines may write into what they are given
            ledger.tracks[part.group].store(part.branch, at, part.of(sample, rows), (held,))
        ledger.weigh()
        if output is not None and asked is call:
            return output
        pieces = [fresh[p] if p in fresh else self._predict(ledger, p, at) for p in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    def _predict(ledger: _Ledger, part: Part, at: Moment) -> Tensor:
        (piece,) = ledger.tracks[part.group].predict(part.branch, at)
        if piece is None:
            raise RuntimeError("feature_cache: a denoiser's prediction was not kept")
        return piece


def _only(call: StepCall, parts: list[Part]) -> StepCall:
    """The call on the rows of `parts`, named after their branch where it is a single one."""
    rows = torch.cat([torch.arange(p.start, p.stop) for p in parts]) if parts else torch.arange(0)
    branches = {p.branch for p in parts}
    taken = call.take(rows) if parts else call
    return replace(taken, branch=branches.pop()) if len(branches) == 1 else taken


def _scatter(output: Tensor, parts: list[Part]) -> dict[Part, Tensor]:
    """The computed rows, by the parts they belong to."""
    return dict(zip(parts, torch.split(output, [p.stop - p.start for p in parts]), strict=True))


def _count(statistics: Statistics, parts: list[Part], todo: list[Part], at: Moment) -> None:
    for branch in dict.fromkeys(p.branch for p in parts):
        asked = sum(p.branch == branch for p in parts)
        statistics.count(branch, at.index, sum(p.branch == branch for p in todo) / asked)


class SegmentCache(CacheMethod):
    """Predicts what a run of inner blocks adds to its input, or puts out where input and output differ in shape.

    The first call of a step decides by the segment's input; a call is computed whole or not at all.
    """

    layer: ClassVar[Layer] = Layer.SEGMENT
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_BLOCK})

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        for denoiser in denoisers:
            if not self.segments(denoiser):
                head, tail = self._edges(denoiser)
                raise MethodInapplicable(
                    f"feature_cache: no block of {denoiser.name} is left between the {head} first and {tail} last "
                    f"ones, which are always computed (it has {len(denoiser.blocks)}). Lower head, tail or depth, or "
                    "use site='step'."
                )

    def _edges(self, denoiser: DenoiserMap) -> tuple[int, int]:
        if denoiser.residual:
            return self.config.head, self.config.tail
        return self.config.depth, self.config.depth

    def segments(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        head, tail = self._edges(denoiser)
        if head + tail >= len(denoiser.blocks):
            return ()
        return (denoiser.segment(head, len(denoiser.blocks) - 1 - tail),)

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.SKIP_BLOCK: frozenset(b.name for s in self.segments(denoiser) for b in s.blocks)}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        inner = len(self.segments(denoiser)[0].blocks)
        return f"{inner} of {len(denoiser.blocks)} blocks of {denoiser.name} can be predicted"

    def _indicator(self) -> Indicator:
        return InputChange()

    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        ledger, at = self._ledger(run, segment.denoiser), self._moment(run)
        parts, rows = _parts(run)
        todo = self._to_compute(ledger, parts, at, lambda part: part.of(streams.image, rows))
        compute = bool(todo) or streams.image.shape not in ledger.sizes
        _count(ledger.statistics, parts, parts if compute else [], at)
        return compute

    def predict_segment(self, run: Run, segment: Segment, streams: Streams) -> Streams:
        ledger, at = self._ledger(run, segment.denoiser), self._moment(run)
        parts, _ = _parts(run)
        pieces = [ledger.tracks[p.group].predict(p.branch, at) for p in parts]
        image, text = (_join([piece[i] for piece in pieces]) for i in (0, 1))
        if image is None:
            raise RuntimeError("feature_cache: a segment's output was not kept")
        if not segment.residual:
            return Streams(image, text)
        added = None if text is None or streams.text is None else streams.text + text
        return Streams(streams.image + image, added)

    def leave_segment(self, run: Run, segment: Segment, before: Streams, after: Streams) -> None:
        ledger, at = self._ledger(run, segment.denoiser), self._moment(run)
        parts, rows = _parts(run)
        ledger.sizes.add(before.image.shape)
        kept = after - before if segment.residual else after
        for part in parts:
            text = None if kept.text is None else part.of(kept.text, rows)
            track = ledger.tracks[part.group]
            track.store(part.branch, at, part.of(before.image, rows), (part.of(kept.image, rows), text))
        ledger.weigh()


def _parts(run: Run) -> tuple[list[Part], int]:
    """The parts and the rows of the denoiser call in progress."""
    if run.call is None:
        raise RuntimeError("feature_cache: a segment was entered outside a denoiser call")
    return parts_of(run, run.call), run.call.rows


def _join(pieces: list[Tensor | None]) -> Tensor | None:
    present = [x for x in pieces if x is not None]
    if len(present) < len(pieces):
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
