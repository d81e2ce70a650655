"""Caching at the step site: whole denoiser calls are predicted from the outputs of earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.method import Claim, Layer
from diffeff.core.run import Run, StepCall
from diffeff.methods.caching.cache import CacheMethod, Ledger
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.track import Moment, Part, parts_of

__all__ = ["StepCache", "StepSite", "latents_in"]


@dataclass(frozen=True)
class StepSite:
    """The denoiser's output, of every guidance branch apart; `relative`: what it is beyond the latents it came from."""

    relative: bool = False

    def build(self, config: CacheConfig, recipe: Recipe) -> StepCache:
        return StepCache(config, recipe, self.relative)


class StepCache(CacheMethod):
    """Predicts the denoiser's output."""

    layer: ClassVar[Layer] = Layer.STEP
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_STEP})

    def __init__(self, config: CacheConfig, recipe: Recipe, relative: bool = False) -> None:
        super().__init__(config, recipe)
        self.relative = relative

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        return f"whole calls of {denoiser.name} can be predicted"

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        ledger, at = self._ledger(run, call.denoiser.name), self._moment(run)
        parts, rows, sample = parts_of(run, call, self.recipe.per_row), call.rows, call.sample
        if self._only_counted(ledger, parts, at):
            return proceed(call)
        todo = self._to_compute(ledger, parts, at, lambda part: self._shown(run, part.of(sample, rows)))
        self._count(ledger.statistics, parts, todo, at)
        asked = call if len(todo) == len(parts) else _only(call, todo)
        output = proceed(asked) if todo else None
        fresh = {} if output is None else _scatter(output, todo)
        for part, piece in fresh.items():
            x, held = part.of(sample, rows), piece.detach().clone()  # pipelines may write into what they are given
            kept = held - latents_in(x, held) if self.relative else held
            ledger.tracks[part.group].store(part.branch, at, x, (kept,), held)
        ledger.weigh()
        if output is not None and asked is call:
            return output
        pieces = [fresh[p] if p in fresh else self._predict(ledger, p, at, p.of(sample, rows)) for p in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _predict(self, ledger: Ledger, part: Part, at: Moment, x: Tensor) -> Tensor:
        (piece,) = ledger.tracks[part.group].predict(part.branch, at)
        if piece is None:
            raise RuntimeError(f"{self.config.name}: a denoiser's prediction was not kept")
        return piece + latents_in(x, piece) if self.relative else piece


def latents_in(x: Tensor, like: Tensor) -> Tensor:
    """The latents within a denoiser's input, in the shape of its output.

    Image conditions follow the latents on one dimension and are cut off; where the output has more than the latents
    (a predicted variance), these entries are zero.
    """
    if x.shape == like.shape:
        return x
    common = tuple(slice(0, min(a, b)) for a, b in zip(x.shape, like.shape, strict=True))
    out = torch.zeros_like(like)
    out[common] = x[common].to(like.dtype)
    return out


def _only(call: StepCall, parts: list[Part]) -> StepCall:
    """The call on the rows of `parts`, named after their branch where it is a single one."""
    rows = torch.cat([torch.arange(p.start, p.stop) for p in parts]) if parts else torch.arange(0)
    branches = {p.branch for p in parts}
    taken = call.take(rows) if parts else call
    return replace(taken, branch=branches.pop()) if len(branches) == 1 else taken


def _scatter(output: Tensor, parts: list[Part]) -> dict[Part, Tensor]:
    """The computed rows, by the parts they belong to."""
    return dict(zip(parts, torch.split(output, [p.stop - p.start for p in parts]), strict=True))
