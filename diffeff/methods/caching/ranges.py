"""Which runs of blocks a cache can predict: the ends of the stack by stage, its first blocks, a set, a UNet's depth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from diffeff.anatomy.layers import deep_layers
from diffeff.anatomy.types import DenoiserMap, Segment
from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.policy import Policy
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import SegmentCache

__all__ = ["BlockSet", "DepthOf", "EndsByStage", "FirstBlocks", "SplitStack", "runs_of"]


class _Ranges(ABC):
    """What the sites below share."""

    def build(self, config: CacheConfig, recipe: Recipe) -> SegmentCache:
        return SegmentCache(config, recipe, self)

    @abstractmethod
    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """The runs of blocks that are predicted."""

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """The recipe's."""
        return None

    def refusal(self, denoiser: DenoiserMap) -> str:
        """UNets have no stack of equal blocks."""
        if not denoiser.residual:
            return f"{denoiser.name} is a UNet, whose blocks differ in shape; use deepcache there."
        return (
            f"{denoiser.name} has {len(denoiser.blocks)} blocks, of which these options choose none (or all of them "
            "twice); choose others."
        )


@dataclass(frozen=True)
class DepthOf(_Ranges):
    """A UNet's part deeper than `level` and `layer` (`diffeff.anatomy.layers`): what it puts out is predicted."""

    level: int = 0
    layer: int = 0

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """The one part; none in transformers and where the cut leaves nothing inside."""
        try:
            return (deep_layers(denoiser, self.level, self.layer),)
        except (ConfigError, MethodInapplicable):
            return ()

    def refusal(self, denoiser: DenoiserMap) -> str:
        """What `deep_layers` says."""
        try:
            deep_layers(denoiser, self.level, self.layer)
        except (ConfigError, MethodInapplicable) as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class FirstBlocks(_Ranges):
    """The first blocks up to the share `share` of the stack: their output itself is kept, not what they add."""

    share: float

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """One prefix; at least one block of the stack stays outside."""
        count = min(round(self.share * len(denoiser.blocks)), len(denoiser.blocks) - 1)
        if not denoiser.residual or count < 1:
            return ()
        return (replace(denoiser.segment(0, count - 1), residual=False),)


@dataclass(frozen=True)
class EndsByStage(_Ranges):
    """The rear share of the stack up to the share `gate` of the run, its front share afterwards; every `interval`-th
    step is computed whole.

    Where both overlap, the shared middle is a run of its own, predicted in both stages: what runs add sums up.
    """

    share: float
    gate: float
    interval: int

    def _count(self, denoiser: DenoiserMap) -> int:
        total = len(denoiser.blocks)
        return min(max(round(self.share * total), 1), total - 1)

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """Front, what both share, rear."""
        total = len(denoiser.blocks)
        if not denoiser.residual or total < 2:
            return ()
        one, two = sorted((self._count(denoiser), total - self._count(denoiser)))
        overlap = self._count(denoiser) == two and one < two
        spans = [(0, one), *([(one, two)] if overlap else []), (two, total)]
        return tuple(denoiser.segment(a, b - 1) for a, b in spans)

    def rule(self, segment: Segment, denoiser: DenoiserMap, clock: Clock) -> Policy | None:
        """Whole steps, and the stage that the run of blocks does not belong to."""
        count, total, entries = self._count(denoiser), len(denoiser.blocks), range(clock.first, clock.total)
        front = segment.blocks[-1].index < count
        rear = segment.blocks[0].index >= total - count
        turn = clock.first + round(self.gate * clock.length)
        active = {i for i in entries if (rear if i < turn else front)}
        whole = {i for i in entries if (i - clock.first) % self.interval == 0}
        return AtEntries(frozenset(whole | (set(entries) - active)))


@dataclass(frozen=True)
class BlockSet(_Ranges):
    """A set of blocks, by index over the whole stack, as maximal runs: one residual is kept per run."""

    blocks: tuple[int, ...]

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """One segment per run."""
        if not denoiser.residual or max(self.blocks, default=0) >= len(denoiser.blocks):
            return ()
        return tuple(denoiser.segment(a, b) for a, b in runs_of(self.blocks))

    def refusal(self, denoiser: DenoiserMap) -> str:
        """Blocks that the model does not have."""
        if denoiser.residual and self.blocks:
            return (
                f"blocks names block {max(self.blocks)}, but {denoiser.name} has {len(denoiser.blocks)} (0 to "
                f"{len(denoiser.blocks) - 1}). Profile this model with diffeff.search.profiles.block_drift."
            )
        return super().refusal(denoiser)


@dataclass(frozen=True)
class SplitStack(_Ranges):
    """The stack cut into `count` runs of about equal length, of which the first is left out: it is always computed."""

    count: int

    def ranges(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """All runs but the first; fewer where there are fewer blocks."""
        total = len(denoiser.blocks)
        count = min(self.count, total)
        if not denoiser.residual or count < 2:
            return ()
        cuts = [round(n * total / count) for n in range(count + 1)]
        return tuple(denoiser.segment(a, b - 1) for a, b in pairwise(cuts[1:]))


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers as (first, last), in order."""
    ordered = sorted(set(numbers))
    if not ordered:
        return []
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    return list(zip(starts, ends, strict=True))
