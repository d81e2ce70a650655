"""Caching the block stack of a transformer: what its blocks add, decided by what the first of them show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffeff.anatomy.types import BlockSite, DenoiserMap, ModuleSite, Segment, Streams
from diffeff.core.method import Outputs, SkipSegment
from diffeff.core.run import Run
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import SegmentCache, SegmentSite, present_parts

__all__ = ["Look", "StackCache", "StackSite"]

Look = Literal["residual", "state", "modulated", "latents"]


@dataclass(frozen=True)
class StackSite(SegmentSite):
    """The blocks of a transformer but the `head` first and `tail` last ones, as one residual per stream.

    `look` is what the indicator sees: the `residual` of the head blocks, the `state` they leave, the `modulated` input
    of the first attention (head must be 0), or the `latents` of the denoiser call. `probe` keeps the residual of the
    head blocks for the predictor; `tapped` shows the indicator the outputs of that many blocks, evenly spaced.
    """

    look: Look = "residual"
    probe: bool = False
    tapped: int = 0

    def build(self, config: CacheConfig, recipe: Recipe) -> StackCache:
        return StackCache(config, recipe, self)

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """The one run; none where blocks change size or nothing shows what is looked at."""
        missing = not denoiser.residual or (self.look == "modulated" and not denoiser.blocks[0].attentions)
        return () if missing else super().ranges(denoiser)

    def refusal(self, denoiser: DenoiserMap) -> str:
        """No stack of equal blocks, no attention to look at, or too few blocks."""
        if not denoiser.residual:
            return (
                f"the blocks of {denoiser.name} ({denoiser.family}) change size, so there is no stack whose sum could "
                "be predicted. Use deepcache or feature_cache (site='segment'), or a cache of whole steps such as "
                "easycache."
            )
        if self.look == "modulated" and not denoiser.blocks[0].attentions:
            return f"the first block of {denoiser.name} has no attention, whose input would be looked at"
        return super().refusal(denoiser)

    def taps(self, denoiser: DenoiserMap) -> tuple[BlockSite, ...]:
        """The blocks whose outputs are looked at."""
        count = min(self.tapped, len(denoiser.blocks))
        last = len(denoiser.blocks) - 1
        return tuple(denoiser.blocks[last - last * n // max(count, 1)] for n in range(count))[::-1]


@dataclass
class _Call:
    """What the blocks of one denoiser call have shown so far."""

    input: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)


class StackCache(SegmentCache):
    """Predicts what the block stack adds to its input."""

    site: StackSite

    def __init__(self, config: CacheConfig, recipe: Recipe, site: StackSite) -> None:
        super().__init__(config, recipe, site)

    @property
    def _probed(self) -> bool:
        return self.site.look == "residual" or self.site.probe

    def block_sites(self, denoiser: DenoiserMap) -> tuple[BlockSite, ...]:
        first = (denoiser.blocks[0],) if self._probed else ()
        return (*first, *(block for block in self.site.taps(denoiser) if block not in first))

    def module_sites(self, denoiser: DenoiserMap) -> tuple[ModuleSite, ...]:
        if self.site.look != "modulated":
            return ()
        first = denoiser.blocks[0].attentions[0]
        return tuple(m for m in denoiser.modules if m.name == first.name)

    # --- what the blocks show -----------------------------------------------------------------------------------
    def _call(self, run: Run) -> _Call:
        name = run.call.denoiser.name if run.call is not None else ""
        return run.state(self, _Call, site=f"call of {name}", branch="")

    def around_block(
        self, run: Run, site: BlockSite, streams: Streams, proceed: Callable[[Streams], Streams]
    ) -> Streams:
        shown = self._call(run)
        if site.index == 0:
            shown.input = streams.image
        after = proceed(streams)
        if self.site.tapped and run.call is not None and site in self.site.taps(run.call.denoiser):
            shown.outputs.append(after.image)
        return after

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        if run.call is None or self._decide(run, self.segments(run.call.denoiser)[0], hidden):
            return proceed()
        raise SkipSegment(self)

    def _decide(self, run: Run, segment: Segment, shown: Tensor) -> bool:
        """Whether to compute, by what the indicator sees of `shown`."""
        ledger, at = self._segment_ledger(run, segment), self._moment(run)
        parts, rows = present_parts(run)
        if self._only_counted(ledger, parts, at):
            return True
        todo = self._to_compute(ledger, parts, at, lambda part: self._shown(run, part.of(shown, rows)))
        self._count(ledger.statistics, parts, parts if todo else [], at)
        return bool(todo)

    # --- the segment --------------------------------------------------------------------------------------------
    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        shown = self._call(run)
        shown.outputs.clear()
        residual = None if shown.input is None else streams.image - shown.input
        shown.input = None
        if self.site.probe and residual is not None and not self.recipe.exact:
            self._note_probe(run, segment, residual)
        if self.site.look == "modulated":
            return True  # decided at the first attention
        seen: dict[Look, Tensor | None] = {"residual": residual, "state": streams.image}
        latents = run.call.sample if run.call is not None else streams.image
        chosen = seen.get(self.site.look)
        return self._decide(run, segment, latents if chosen is None else chosen)

    def _note_probe(self, run: Run, segment: Segment, residual: Tensor) -> None:
        ledger = self._segment_ledger(run, segment)
        parts, rows = present_parts(run)
        for part in parts:
            self._track(ledger, part.group).aux[part.branch] = part.of(residual, rows)

    def leave_segment(self, run: Run, segment: Segment, before: Streams, after: Streams) -> None:
        ledger, at = self._segment_ledger(run, segment), self._moment(run)
        parts, rows = present_parts(run)
        outputs = self._call(run).outputs
        if self.recipe.exact:
            outputs.clear()
            return
        kept = after - before
        for part in parts:
            pair = part.of(kept.image, rows), None if kept.text is None else part.of(kept.text, rows)
            told = torch.stack([part.of(x, rows) for x in outputs]) if outputs else None
            ledger.tracks[part.group].store(part.branch, at, part.of(before.image, rows), pair, told)
        outputs.clear()
        ledger.weigh()
