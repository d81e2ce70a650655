"""Elastic-Cache for images and video: how deep a step is computed follows the drift of its most attended tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffeff.anatomy.types import AttentionSite, DenoiserMap, Segment, Streams
from diffeff.core.config import knob
from diffeff.core.method import AttentionCall
from diffeff.core.run import Run
from diffeff.methods.caching.indicator import relative_change
from diffeff.methods.caching.policy import Threshold
from diffeff.methods.caching.ranges import SplitStack
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import SegmentCache
from diffeff.methods.caching.track import Track

__all__ = ["ElasticCache", "attended"]

_QUERIES = 256
"""Query rows from which attention mass is estimated."""


@dataclass(frozen=True, kw_only=True)
class ElasticCache(CacheConfig):
    """Each step is computed as deep as it needs to be: shallow blocks or deep ones are reused, by measured drift.

    The stack is cut into `segments` runs of blocks. The first is always computed; before each other one, the drift of
    the `anchors` most attended image tokens since that run was last computed is measured (relative L1 of its input).
    `cascade="refresh"`: runs are reused up to the first whose drift reaches `threshold`, from which on everything is
    computed. `cascade="reuse"`: runs are computed up to the first whose drift stays below it, from which on everything
    is reused. What a run adds to its input is kept.

    Differs: the original caches keys and values of a masked language model, where finished tokens do not change. In
    diffusion all tokens change at every step, so what is reused here is what blocks add; most-attended tokens, drift
    per depth and refreshing the deeper part are kept. That a low drift there means a low drift elsewhere is an
    observation, not a bound: `first`, `cap` and `last` guard it.

    Defaults: `threshold` and `segments` are ours, to be tuned.

    Attention mass comes from 256 queries of the last attention before the first cut, at every step; where the place of
    the image tokens is not known, and under context or tensor parallelism, all tokens count. One number per cut is read
    back from the device. Transformers only. Holds one residual and one input per run and branch.

    Source: Elastic-Cache (arXiv 2510.14973), adapted.
    """

    name: ClassVar[str] = "elastic_cache"
    summary: ClassVar[str] = "How deep a step is computed follows the drift of its most attended tokens."

    threshold: float = knob(
        0.1, "drift from which a run of blocks is computed; 0 is exact", low=0.0, high=5.0, step=0.01
    )
    segments: int = knob(4, "runs of blocks the stack is cut into", low=2, high=16, step=1)
    cascade: Literal["refresh", "reuse"] = knob(
        "refresh", "compute from the first drifting run on, or up to a steady one"
    )
    anchors: int = knob(64, "most attended tokens whose drift is measured; 0: all tokens", low=0, step=16)
    cap: int = knob(5, "most steps in a row in which a run is reused", low=1, high=16, step=1)
    first: int = knob(3, "first steps that are always computed", low=1, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)

    def recipe(self) -> Recipe:
        return Recipe(
            SplitStack(self.segments),
            Threshold(self.threshold),
            first=self.first,
            last=self.last,
            cap=self.cap,
            exact=self.threshold == 0,
        )

    def build(self) -> ElasticMethod:
        return ElasticMethod(self)


@dataclass
class _Cascade:
    """One denoiser's step: whether the cascade has tipped, and which image tokens are the anchors."""

    index: int = -1
    tipped: bool = False
    anchors: Tensor | None = None

    def turn(self, index: int) -> None:
        """A new step begins untipped."""
        if index != self.index:
            self.index, self.tipped = index, False


@dataclass
class _AnchorDrift:
    """Relative L1 change of the anchors in a run's input; past the tipping point what the cascade says."""

    cascade: _Cascade
    refresh: bool
    reference: Tensor | None = None

    def change(self, x: Tensor) -> float | None:
        if self.cascade.tipped:
            return None if self.refresh else 0.0  # unknown: compute
        if self.reference is None:
            return None
        chosen = self.cascade.anchors
        if chosen is None:
            return relative_change(x, self.reference)
        return relative_change(x[:, chosen], self.reference[:, chosen])

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        self.reference = x


def attended(call: AttentionCall, first: int, stop: int, count: int) -> Tensor:
    """The `count` key tokens of `first` to `stop` with the largest attention mass, over all rows and heads, estimated
    from at most 256 evenly spaced queries; counted from `first`."""
    q, k = call.q.detach(), call.k.detach()
    if k.shape[1] != q.shape[1]:  # grouped queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    picked = torch.linspace(0, q.shape[2] - 1, min(_QUERIES, q.shape[2]), device=q.device).long()
    scale = call.options.get("scale") or q.shape[-1] ** -0.5
    mass: Tensor = (q[:, :, picked].float() @ k.float().transpose(-1, -2) * scale).softmax(-1).sum((0, 1, 2))
    own = mass[first:stop]
    found: Tensor = own.topk(min(count, len(own))).indices
    return found


class ElasticMethod(SegmentCache):
    """A segment cache whose runs of blocks decide one after the other."""

    def __init__(self, config: ElasticCache) -> None:
        recipe = config.recipe()
        super().__init__(config, recipe, recipe.site)  # type: ignore[arg-type]
        self.options = config

    @property
    def decides(self) -> str:
        return "batch together"

    def attention_sites(self, denoiser: DenoiserMap) -> tuple[AttentionSite, ...]:
        cut = self.segments(denoiser)[0].blocks[0].index
        before = [site for site in denoiser.attentions if site.block < cut and site.kind in ("self", "joint")]
        return tuple(before[-1:]) if self.options.anchors else ()

    def around_attention(
        self, run: Run, site: AttentionSite, call: AttentionCall, proceed: Callable[[AttentionCall], Tensor]
    ) -> Tensor:
        if run.call is not None:
            denoiser, tokens = run.call.denoiser, call.k.shape[2]
            grid = denoiser.grid(site, tokens, run.call.arguments)
            cascade = self._cascade(run, denoiser)
            cascade.anchors = None
            whole = self._sharing(run, denoiser) is None  # else each rank has other tokens than its attention sees
            if whole and grid is not None and grid.image_tokens > self.options.anchors:
                begin = grid.text if grid.text_first else 0
                cascade.anchors = attended(call, begin, begin + grid.image_tokens, self.options.anchors)
        return proceed(call)

    def _cascade(self, run: Run, denoiser: DenoiserMap) -> _Cascade:
        return run.state(self, _Cascade, site=f"cascade {denoiser.name}", branch="")

    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        if run.call is None:
            raise RuntimeError("elastic_cache: a segment was reached outside a denoiser call")
        cascade = self._cascade(run, run.call.denoiser)
        cascade.turn(run.clock.index)
        compute = super().enter_segment(run, segment, streams)
        cascade.tipped = cascade.tipped or compute is (self.options.cascade == "refresh")
        return compute

    def _new_track(self, run: Run, segment: Segment, denoiser: DenoiserMap) -> Track:
        track = super()._new_track(run, segment, denoiser)
        track.ranks = self._sharing(run, denoiser)
        track.indicator = _AnchorDrift(self._cascade(run, denoiser), self.options.cascade == "refresh")
        return track
