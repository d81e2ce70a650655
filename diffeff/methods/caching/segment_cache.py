"""Caching at the segment site: runs of blocks are predicted, the blocks around them run at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from diffeff.anatomy.types import DenoiserMap, Segment, Streams
from diffeff.core.method import Claim, Layer
from diffeff.core.run import Clock, Run
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.cache import CacheMethod, Ledger, join
from diffeff.methods.caching.policy import Policy
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.track import Part, Track, parts_of

__all__ = ["BlockRanges", "SegmentCache", "SegmentSite", "present_parts"]


class BlockRanges(Protocol):
    """Which runs of blocks can be predicted."""

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """The runs, disjoint, in order of execution; none where the model has none."""

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """A policy of its own for one of them, asked once per run; None: the recipe's."""

    def refusal(self, denoiser: DenoiserMap) -> str:
        """Why there are none, and what to do."""


@dataclass(frozen=True)
class SegmentSite:
    """All blocks but the `head` first and `tail` last ones (transformers), or the `depth` outermost levels (UNets)."""

    head: int = 1
    tail: int = 0
    depth: int = 1

    def build(self, config: CacheConfig, recipe: Recipe) -> SegmentCache:
        return SegmentCache(config, recipe, self)

    def edges(self, denoiser: DenoiserMap) -> tuple[int, int]:
        """How many blocks at both ends are always computed."""
        return (self.head, self.tail) if denoiser.residual else (self.depth, self.depth)

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """The one run between the edges."""
        head, tail = self.edges(denoiser)
        if head + tail >= len(denoiser.blocks):
            return ()
        return (denoiser.segment(head, len(denoiser.blocks) - 1 - tail),)

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """The recipe's."""
        return None

    def refusal(self, denoiser: DenoiserMap) -> str:
        """The edges take all blocks."""
        head, tail = self.edges(denoiser)
        return (
            f"no block of {denoiser.name} is left between the {head} first and {tail} last ones, which are always "
            f"computed (it has {len(denoiser.blocks)}). Lower head, tail or depth, or cache whole steps (feature_cache "
            "with site='step')."
        )


class SegmentCache(CacheMethod):
    """Predicts what runs of blocks add to their input, or put out where input and output differ in shape (or where the
    segment says so). The first call of a step decides by the segment's input; a call is computed whole or not at all.
    """

    layer: ClassVar[Layer] = Layer.SEGMENT
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_BLOCK})
    skipped: ClassVar[str] = "steps' inner blocks"

    def __init__(self, config: CacheConfig, recipe: Recipe, site: BlockRanges) -> None:
        super().__init__(config, recipe)
        self.site = site

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        super().bind(denoisers)
        for denoiser in denoisers:
            if not self.segments(denoiser):
                raise MethodInapplicable(f"{self.config.name}: {self.site.refusal(denoiser)}")

    def segments(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        return self.site.ranges(denoiser)

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.SKIP_BLOCK: frozenset(b.name for s in self.segments(denoiser) for b in s.blocks)}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        inner = sum(block.share for s in self.segments(denoiser) for block in s.blocks)
        return f"{inner:.3g} of {len(denoiser.blocks)} blocks of {denoiser.name} can be predicted"

    # --- run ----------------------------------------------------------------------------------------------------
    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        ledger, at = self._segment_ledger(run, segment), self._moment(run)
        parts, rows = present_parts(run)
        if self._only_counted(ledger, parts, at):
            return True
        todo = self._to_compute(ledger, parts, at, lambda part: self._shown(run, part.of(streams.image, rows)))
        compute = bool(todo) or streams.image.shape not in ledger.sizes
        self._count(ledger.statistics, parts, parts if compute else [], at)
        return compute

    def predict_segment(self, run: Run, segment: Segment, streams: Streams) -> Streams:
        ledger, at = self._segment_ledger(run, segment), self._moment(run)
        parts, _ = present_parts(run)
        pieces = [ledger.tracks[p.group].predict(p.branch, at) for p in parts]
        image, text = (join([piece[i] for piece in pieces]) for i in (0, 1))
        if image is None:
            raise RuntimeError(f"{self.config.name}: a segment's output was not kept")
        if not segment.residual:
            return Streams(image, text)
        added = None if text is None or streams.text is None else streams.text + text
        return Streams(streams.image + image, added)

    def leave_segment(self, run: Run, segment: Segment, before: Streams, after: Streams) -> None:
        if self.recipe.exact:
            return
        ledger, at = self._segment_ledger(run, segment), self._moment(run)
        parts, rows = present_parts(run)
        ledger.sizes.add(before.image.shape)
        kept = after - before if segment.residual else after
        for part in parts:
            text = None if kept.text is None else part.of(kept.text, rows)
            track = ledger.tracks[part.group]
            track.store(part.branch, at, part.of(before.image, rows), (part.of(kept.image, rows), text))
        ledger.weigh()

    def _segment_ledger(self, run: Run, segment: Segment) -> Ledger:
        """What is remembered of one run of blocks, its track made with the rule that holds there."""
        if run.call is None:
            raise RuntimeError(f"{self.config.name}: a segment was reached outside a denoiser call")
        denoiser = run.call.denoiser
        several = run.state(self, lambda: len(self.segments(denoiser)) > 1, site=f"several {denoiser.name}", branch="")
        ledger = self._ledger(run, segment.name if several else denoiser.name)
        if not ledger.tracks:
            ledger.add(0, self._new_track(run, segment, denoiser))
        return ledger

    def _new_track(self, run: Run, segment: Segment, denoiser: DenoiserMap) -> Track:
        recipe, own = self.recipe, self.site.rule(segment, denoiser, run.clock)
        rules = recipe.rules if own is None else replace(recipe, policy=own).rules
        indicator = None if recipe.indicator is None else recipe.indicator()
        return Track(rules, recipe.predictor, indicator, recipe.feedback)


def present_parts(run: Run) -> tuple[list[Part], int]:
    """The parts and the rows of the denoiser call in progress."""
    if run.call is None:
        raise RuntimeError("a cache's site was reached outside a denoiser call")
    return parts_of(run, run.call), run.call.rows
