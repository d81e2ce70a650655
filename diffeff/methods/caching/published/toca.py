"""ToCa: between whole steps, only the tokens that matter or have waited long are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from diffeff.anatomy.types import ModuleSite
from diffeff.core.config import knob
from diffeff.core.run import Clock
from diffeff.methods.caching.module_cache import MODULES
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.token_cache import PARTIAL, Tokens
from diffeff.methods.caching.token_scores import Scoring

__all__ = ["ToCa"]


@dataclass(frozen=True, kw_only=True)
class ToCa(CacheConfig):
    """Every n-th step is computed whole; in between, cross-attention and feed-forward compute a share of their tokens.

    The linear layers of these modules are given the chosen tokens only, so what is left out is not computed; the other
    tokens keep their last output, and computed ones replace theirs. Self- and joint attention, where every token needs
    all others, are reused whole (`attention="reuse"`, as published) or computed whole. In blocks with a fused
    feed-forward (Flux's single blocks) its two linear layers are given the chosen tokens.

    Which tokens: `score="attention"` takes those most attended to when their block was last computed (s1), `"entropy"`
    those whose attention over the text was most spread (s2), `"auto"` the second where a block has cross-attention, the
    first elsewhere, as the authors do. To it come the steps a token has waited (s3, weight `staleness`) and, for the
    best token of each `window` x `window` of its frame, a bonus (s4, `spread` of its score). `"random"` draws them,
    alike in all modules of a step: DuCa's authors found it no worse, and it measures nothing.

    How many: `ratio`, times a factor that falls over the blocks from 1 + `layer_slope` to 1 - `layer_slope` and over
    the run likewise with `time_slope`, times 0.6 in cross-attention and 1.6 in feed-forward modules (`cross`,
    `feed_forward`).

    Defaults: factors and weights are those of the authors' PixArt code; `interval` and `ratio` in `PUBLISHED` are
    theirs by family. With all of them at 1, both slopes 0 and `attention="compute"` it is bit-exact.

    Differs: s1 is estimated from the attention probabilities of 256 queries; it and s2, from those over the text, are
    taken per block at whole steps only. The number of chosen tokens depends on block and step, not on data, so no
    number is read back. Holds one output per module and branch (FLUX at 1024 pixels: above 20 GB beyond the model).
    Transformers only.

    Source: ToCa (arXiv 2410.05317).
    """

    name: ClassVar[str] = "toca"
    summary: ClassVar[str] = "Between whole steps, modules compute only the tokens that matter or have waited long."
    PUBLISHED: ClassVar[Mapping[str, tuple[int, float]]] = MappingProxyType(
        {"dit": (4, 0.07), "pixart": (3, 0.3), "flux": (4, 0.1)}
    )
    """interval and ratio"""

    interval: int = knob(3, "compute everything every n-th step; 1 is exact", low=1, high=16, step=1)
    ratio: float = knob(0.3, "share of tokens computed in between", low=0.0, high=1.0, step=0.05)
    attention: Literal["reuse", "compute"] = knob("reuse", "self- and joint attention in between")
    score: Literal["auto", "attention", "entropy", "random"] = knob("auto", "what tokens are chosen by")
    layer_slope: float = knob(0.6, "how much the share falls from the first to the last block", low=0.0, high=1.0)
    time_slope: float = knob(0.9, "how much the share falls from the first to the last step", low=0.0, high=1.0)
    cross: float = knob(0.6, "factor of the share in cross-attention", low=0.0, high=4.0)
    feed_forward: float = knob(1.6, "factor of the share in feed-forward modules", low=0.0, high=4.0)
    staleness: float = knob(0.25, "weight of the steps a token has waited", low=0.0, high=4.0)
    spread: float = knob(0.4, "bonus of the best token of each window", low=0.0, high=4.0)
    window: int = knob(2, "edge of these windows in tokens", low=1, high=16, step=1)
    first: int = knob(1, "first steps that are always computed", low=1, step=1)
    last: int = knob(0, "last steps that are always computed", low=0, step=1)

    def share(self, site: ModuleSite, clock: Clock, blocks: int) -> float:
        """Share of a module's tokens to compute at this step."""
        depth = site.block / max(blocks - 1, 1)
        by_layer = 1 + self.layer_slope * (1 - 2 * depth)
        by_time = 1 + self.time_slope * (1 - 2 * clock.fraction)
        by_kind = self.cross if site.kind == "cross" else self.feed_forward
        return min(self.ratio * by_layer * by_time * by_kind, 1.0)

    @property
    def exact(self) -> bool:
        """Whether these options compute every token at every step."""
        least = self.ratio * (1 - self.layer_slope) * (1 - self.time_slope) * min(self.cross, self.feed_forward)
        return self.interval == 1 or (least >= 1 and self.attention == "compute")

    def site(self) -> Tokens:
        """The modules, and how their tokens are chosen."""
        return Tokens(
            MODULES if self.attention == "reuse" else PARTIAL,
            share=self.share,
            score=self.score,
            scoring=Scoring(self.staleness, self.spread, self.window),
            interval=self.interval,
        )

    def recipe(self) -> Recipe:
        return Recipe(self.site(), Interval(self.interval), first=self.first, last=self.last, exact=self.exact)
