"""L2P: steps between computed ones are weighted sums whose weights were fitted to recorded runs of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffeff.core.config import knob
from diffeff.errors import ConfigError
from diffeff.methods.caching.fitted import Corrected, Fitted, FittedRow, Mixing, Weights
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.predictor import AnyPredictor
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.step_cache import StepSite

__all__ = ["L2P"]


@dataclass(frozen=True, kw_only=True)
class L2P(CacheConfig):
    """Computes every n-th step; the weights of the others are learned from a few prompts, for every step apart.

    What is predicted is the denoiser's output, per guidance branch, from the last `depth` computed ones. The published
    form has one set of weights per step; `groups="channels"` has one per group of channels with like dynamics (after
    HyCa), `"bands"` one below and one above a quarter of the highest frequency. `rank` adds a small trained module: per
    horizon a matrix of that rank that maps, pixel by pixel, what the snapshots show to what the sum misses.

    Differs: the paper descends the gradient of one set of weights per step, from holding; here they are solved for.

    Defaults: ours, to be tuned; nothing acts before a calibration.

    All of it is made by `diffeff.search.calibration.calibrate(pipe, job, L2P(...))` in closed form from one plain run
    of a few prompts: ridge regression towards a line, where the paper descends its gradient from holding. At another
    number of steps, the row of the same distance from the last computed step and the nearest noise level serves; a line
    where none does.

    Options filled in by calibration: `times` and `horizons` of the rows, their `weights` (row by row, group by group,
    oldest snapshot first), the group of each channel (`members`), the band edges (`cutoffs`), and the matrices of the
    trained module (`out`, `into`, by horizon, row by row).

    Memory: `depth` latents per branch.

    Source: L2P (arXiv 2604.26365); HyCa (arXiv 2510.04188) for groups of channels.
    """

    name: ClassVar[str] = "l2p"
    summary: ClassVar[str] = "Steps between computed ones are sums whose weights were fitted to your model."

    interval: int = knob(3, "compute every n-th step; 1 is exact", low=1, high=16, step=1)
    depth: int = knob(3, "computed steps a sum draws on", low=1, high=8, step=1)
    groups: Literal["none", "channels", "bands"] = knob("none", "parts of a tensor that have weights of their own")
    rank: int = knob(0, "rank of the trained correction; 0: none", low=0, high=64, step=1)
    first: int = knob(3, "first steps that are always computed", low=1, step=1)
    last: int = knob(1, "last steps that are always computed", low=0, step=1)
    times: tuple[float, ...] = knob((), "noise level (or index) of each fitted step")
    horizons: tuple[int, ...] = knob((), "steps since the last computed one, of each fitted step", low=1)
    weights: tuple[float, ...] = knob((), "weights by fitted step, group and snapshot")
    members: tuple[int, ...] = knob((), "group of each channel", low=0)
    cutoffs: tuple[float, ...] = knob((), "edges of the bands as shares of the highest frequency", low=0.0, high=1.0)
    out: tuple[float, ...] = knob((), "trained correction: by horizon, [channels, rank]")
    into: tuple[float, ...] = knob((), "trained correction: by horizon, [rank, depth * channels]")

    def check(self) -> None:
        wanted = len(self.times) * self.parts * self.depth
        if len(self.weights) != wanted or len(self.horizons) != len(self.times):
            raise ConfigError(
                f"l2p.weights has {len(self.weights)} values and horizons {len(self.horizons)}; {len(self.times)} "
                f"steps, {self.parts} groups and depth {self.depth} need {wanted} and {len(self.times)}"
            )
        if len(self.into) != self.depth * len(self.out) or (self.out and len(self.out) % (self.reach * self.rank)):
            raise ConfigError(
                f"l2p.out has {len(self.out)} values and into {len(self.into)}; rank {self.rank} and interval "
                f"{self.interval} need {self.reach} matrices [channels, rank], and {self.depth} times as many values"
            )

    @property
    def parts(self) -> int:
        """Groups that have weights of their own."""
        return max(self.members) + 1 if self.members else len(self.cutoffs) + 1

    @property
    def reach(self) -> int:
        """The longest horizon."""
        return max(self.interval - 1, 1)

    def computed(self, length: int) -> list[int]:
        """The steps of a run of this length that are computed."""
        found: list[int] = []
        for i in range(length):
            if i < self.first or length - 1 - i < self.last or not found or i - found[-1] >= self.interval:
                found.append(i)
        return found

    def predictor(self) -> AnyPredictor:
        """The fitted one."""
        size = self.parts * self.depth
        rows = [_cut(self.weights[n * size : (n + 1) * size], self.depth) for n in range(len(self.times))]
        named = zip(self.times, self.horizons, rows, strict=True)
        fitted = Fitted(tuple(FittedRow(*row) for row in named), self.depth, self.members, self.cutoffs)
        if not self.out:
            return fitted
        each = len(self.out) // self.reach
        out = tuple(_cut(self.out[h * each : (h + 1) * each], self.rank) for h in range(self.reach))
        width = self.depth * each
        into = tuple(_cut(self.into[h * width : (h + 1) * width], width // self.rank) for h in range(self.reach))
        return Corrected(fitted, Mixing(out, into, self.depth))

    def recipe(self) -> Recipe:
        missing = (
            "it has no fitted weights (times, horizons, weights). Fit them to a few prompts with "
            "diffeff.search.calibration.calibrate(pipe, job, config)."
        )
        return Recipe(
            site=StepSite(),
            policy=Interval(self.interval),
            predictor=self.predictor(),
            first=self.first,
            last=self.last,
            exact=self.interval == 1,
            missing="" if self.times or self.interval == 1 else missing,
        )


def _cut(values: tuple[float, ...], width: int) -> Weights:
    return tuple(values[i : i + width] for i in range(0, len(values), width))
