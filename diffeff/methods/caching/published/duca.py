"""DuCa: aggressive steps that skip all blocks take turns with conservative ones that compute some tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.anatomy.types import DenoiserMap, Segment, Streams
from diffeff.core.config import knob
from diffeff.core.method import Claim
from diffeff.core.run import Run
from diffeff.methods.caching.cache import join
from diffeff.methods.caching.published.toca import ToCa
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import present_parts
from diffeff.methods.caching.token_cache import TokenCache, Tokens

__all__ = ["DuCa"]


@dataclass(frozen=True, kw_only=True)
class DuCa(ToCa):
    """ToCa with every other step in between skipped whole: what the block stack added last is added again.

    Behind a whole step, aggressive steps (no block is computed) and conservative ones (ToCa's) take turns, an
    aggressive one first; a conservative step corrects what the aggressive ones have let drift. Tokens are drawn at
    random, which the authors' second version found as good as their scores, and which needs no attention probabilities;
    ToCa's scores are there too.

    Differs: which of the two comes first is inferred.

    Defaults: `interval` 5 for FLUX and the share of tokens are published; what they are not, is ToCa's.

    Holds what ToCa holds and one residual of the stack per branch.

    Source: DuCa (arXiv 2412.18911).
    """

    name: ClassVar[str] = "duca"
    summary: ClassVar[str] = "Steps that skip all blocks take turns with steps that compute some tokens."
    PUBLISHED: ClassVar[Mapping[str, tuple[int, float]]] = MappingProxyType({"flux": (5, 0.1), "pixart": (3, 0.3)})
    """interval and ratio"""

    score: Literal["auto", "attention", "entropy", "random"] = knob("random", "what tokens are chosen by")

    @property
    def exact(self) -> bool:
        return self.interval == 1

    def site(self) -> Tokens:
        tokens = super().site()
        return _Alternating(**{f.name: getattr(tokens, f.name) for f in fields(tokens)})

    def aggressive(self, done: int, left: int) -> bool:
        """Whether a step, with so many before and after it, skips all blocks."""
        behind = (done - self.first + 1) % self.interval
        return done >= self.first and left >= self.last and behind % 2 == 1


@dataclass(frozen=True)
class _Alternating(Tokens):
    def build(self, config: CacheConfig, recipe: Recipe) -> TokenCache:
        return _DuCaMethod(config, recipe, self)


@dataclass
class _Stack:
    """What the block stack added when it last ran, by branch."""

    added: dict[str, Streams] = field(default_factory=dict)


class _DuCaMethod(TokenCache):
    """A token cache that leaves out all blocks at some steps."""

    claims: ClassVar[frozenset[Claim]] = TokenCache.claims | {Claim.SKIP_BLOCK}
    config: DuCa

    def segments(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        return (denoiser.segment(),)

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        blocks = frozenset(block.name for block in denoiser.blocks)
        return {**super().claimed(denoiser), Claim.SKIP_BLOCK: blocks}

    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        parts, _ = present_parts(run)
        known = self._stack(run).added
        return not (self.config.aggressive(run.clock.done, run.clock.left) and all(p.branch in known for p in parts))

    def predict_segment(self, run: Run, segment: Segment, streams: Streams) -> Streams:
        parts, _ = present_parts(run)
        added = [self._stack(run).added[part.branch] for part in parts]
        image, text = join([x.image for x in added]), join([x.text for x in added])
        if image is None:
            raise RuntimeError(f"{self.config.name}: what the blocks added was not kept")
        more = None if text is None or streams.text is None else streams.text + text
        return Streams(streams.image + image, more)

    def leave_segment(self, run: Run, segment: Segment, before: Streams, after: Streams) -> None:
        if self.recipe.exact:
            return
        (parts, rows), added = present_parts(run), after - before
        for part in parts:
            self._stack(run).added[part.branch] = added.map(lambda x, part=part: part.of(x, rows))  # type: ignore[misc]

    def _stack(self, run: Run) -> _Stack:
        name = "" if run.call is None else run.call.denoiser.name
        return run.state(self, _Stack, site=f"stack {name}", branch="")
