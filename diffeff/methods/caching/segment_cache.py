"""Caching at the segment site: the inner blocks are predicted, the outer ones run at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffeff.anatomy.types import DenoiserMap, Segment, Streams
from diffeff.core.method import Claim, Layer
from diffeff.core.run import Run
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.cache import CacheMethod, join
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.track import Part, parts_of

__all__ = ["SegmentCache", "SegmentSite", "present_parts"]


@dataclass(frozen=True)
class SegmentSite:
    """All blocks but the `head` first and `tail` last ones (transformers), or the `depth` outermost levels (UNets)."""

    head: int = 1
    tail: int = 0
    depth: int = 1

    def build(self, config: CacheConfig, recipe: Recipe) -> SegmentCache:
        return SegmentCache(config, recipe, self)


class SegmentCache(CacheMethod):
    """Predicts what a run of inner blocks adds to its input, or puts out where input and output differ in shape.

    The first call of a step decides by the segment's input; a call is computed whole or not at all.
    """

    layer: ClassVar[Layer] = Layer.SEGMENT
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_BLOCK})
    skipped: ClassVar[str] = "steps' inner blocks"

    def __init__(self, config: CacheConfig, recipe: Recipe, site: SegmentSite) -> None:
        super().__init__(config, recipe)
        self.site = site

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        for denoiser in denoisers:
            if not self.segments(denoiser):
                head, tail = self._edges(denoiser)
                raise MethodInapplicable(
                    f"{self.config.name}: no block of {denoiser.name} is left between the {head} first and {tail} last "
                    f"ones, which are always computed (it has {len(denoiser.blocks)}). Lower head, tail or depth, or "
                    "cache whole steps (feature_cache with site='step')."
                )

    def _edges(self, denoiser: DenoiserMap) -> tuple[int, int]:
        if denoiser.residual:
            return self.site.head, self.site.tail
        return self.site.depth, self.site.depth

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

    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        ledger, at = self._ledger(run, segment.denoiser), self._moment(run)
        parts, rows = present_parts(run)
        todo = self._to_compute(ledger, parts, at, lambda part: part.of(streams.image, rows))
        compute = bool(todo) or streams.image.shape not in ledger.sizes
        self._count(ledger.statistics, parts, parts if compute else [], at)
        return compute

    def predict_segment(self, run: Run, segment: Segment, streams: Streams) -> Streams:
        ledger, at = self._ledger(run, segment.denoiser), self._moment(run)
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
        ledger, at = self._ledger(run, segment.denoiser), self._moment(run)
        parts, rows = present_parts(run)
        ledger.sizes.add(before.image.shape)
        kept = after - before if segment.residual else after
        for part in parts:
            text = None if kept.text is None else part.of(kept.text, rows)
            track = ledger.tracks[part.group]
            track.store(part.branch, at, part.of(before.image, rows), (part.of(kept.image, rows), text))
        ledger.weigh()


def present_parts(run: Run) -> tuple[list[Part], int]:
    """The parts and the rows of the denoiser call in progress."""
    if run.call is None:
        raise RuntimeError("a cache's site was reached outside a denoiser call")
    return parts_of(run, run.call), run.call.rows
