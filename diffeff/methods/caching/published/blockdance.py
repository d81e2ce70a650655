"""BlockDance: the structure that the first blocks have found is reused, the later blocks go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffeff.core.config import knob
from diffeff.errors import ConfigError
from diffeff.methods.caching.policy import Action, FirstOf, Interval, Opening, Policy, Situation
from diffeff.methods.caching.ranges import FirstBlocks
from diffeff.methods.caching.recipe import CacheConfig, Recipe

__all__ = ["BlockDance"]


@dataclass(frozen=True)
class _Closing:
    """Computes from the share `share` of the run on."""

    share: float

    def decide(self, at: Situation) -> Action:
        return Action.COMPUTE if at.done >= int(self.share * at.length) else Action.PREDICT


@dataclass(frozen=True, kw_only=True)
class BlockDance(CacheConfig):
    """Three quarters of the blocks are skipped at every second step of the later run, once the structure stands.

    From the share `start` of the run to the share `stop`, steps form groups of `interval`: the first is computed, the
    others start from the output that the first share `blocks` of the stack had there. It is that output itself which is
    kept, not what the blocks add: the latents of the present step enter through the later blocks' modulation only.

    Defaults: the paper's for PixArt: the output of block 20 (counted from 0) of 28, 40 % to 95 %, groups of 2.

    Differs: its learned variant (BlockDance-Ada, a policy network) is not part of this.

    Transformers only. Holds one tensor per stream and branch.

    Source: BlockDance (arXiv 2503.15927).
    """

    name: ClassVar[str] = "blockdance"
    summary: ClassVar[str] = "Later steps start from what the first blocks put out a step before."

    PUBLISHED: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "pixart": {"start": 0.4, "stop": 0.95},
        "dit": {"start": 0.25, "stop": 0.95},
        "open_sora": {"start": 0.25, "stop": 0.95},
    }

    interval: int = knob(
        2, "size of a group: one step computed, the others reuse it; 1 is exact", low=1, high=8, step=1
    )
    blocks: float = knob(0.75, "share of the stack whose output is reused", low=0.05, high=0.95, step=0.05)
    start: float = knob(0.4, "share of the run after which outputs are reused", low=0.0, high=1.0, step=0.05)
    stop: float = knob(0.95, "share of the run up to which outputs are reused", low=0.0, high=1.0, step=0.05)

    def check(self) -> None:
        if self.stop <= self.start:
            raise ConfigError(f"blockdance.stop is {self.stop:g}; it must be greater than start ({self.start:g})")

    def recipe(self) -> Recipe:
        rules: Policy = FirstOf((Opening(self.start), _Closing(self.stop), Interval(self.interval)))
        return Recipe(FirstBlocks(self.blocks), rules, exact=self.interval == 1)
