"""Caching at the module site: outputs of attention and feed-forward modules, by kind, in all blocks or some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, ModuleKind, ModuleSite
from diffeff.core.method import Claim, Layer, Outputs
from diffeff.core.run import Run
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.cache import CacheMethod, join
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import present_parts

__all__ = ["ModuleCache", "Modules"]


@dataclass(frozen=True)
class Modules:
    """The modules of these kinds, in blocks `first_block` to `last_block` (None: to the end). Their outputs stand
    before the gate and the residual sum, so that both follow the present step."""

    kinds: tuple[ModuleKind, ...]
    first_block: int = 0
    last_block: int | None = None

    def build(self, config: CacheConfig, recipe: Recipe) -> ModuleCache:
        return ModuleCache(config, recipe, self)

    def holds(self, site: ModuleSite) -> bool:
        """Whether the site is one of them."""
        stop = float("inf") if self.last_block is None else self.last_block
        return site.kind in self.kinds and self.first_block <= site.block <= stop


class ModuleCache(CacheMethod):
    """Predicts the outputs of modules. Each decides for itself; under rules that count steps all agree."""

    layer: ClassVar[Layer] = Layer.MODULE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_MODULE})
    skipped: ClassVar[str] = "steps' modules"

    def __init__(self, config: CacheConfig, recipe: Recipe, site: Modules) -> None:
        super().__init__(config, recipe)
        self.site = site

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        for denoiser in denoisers:
            if not self.module_sites(denoiser):
                there = ", ".join(sorted({m.kind for m in denoiser.modules})) or "none that are known"
                raise MethodInapplicable(
                    f"{self.config.name}: {denoiser.name} has no {' or '.join(self.site.kinds)} module in the chosen "
                    f"blocks. Kinds it has: {there}."
                )

    def module_sites(self, denoiser: DenoiserMap) -> tuple[ModuleSite, ...]:
        return tuple(m for m in denoiser.modules if self.site.holds(m))

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.SKIP_MODULE: frozenset(m.name for m in self.module_sites(denoiser))}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        return (
            f"{len(self.module_sites(denoiser))} of {len(denoiser.modules)} modules of {denoiser.name} can be predicted"
        )

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        if run.call is None:
            raise RuntimeError(f"{self.config.name}: a module was reached outside a denoiser call")
        ledger, at = self._ledger(run, f"{run.call.denoiser.name}.{site.name}"), self._moment(run)
        parts, rows = present_parts(run)
        todo = self._to_compute(ledger, parts, at, lambda part: part.of(hidden, rows))
        self._count(ledger.statistics, parts, parts if todo else [], at)
        if not todo:
            pieces = [ledger.tracks[p.group].predict(p.branch, at) for p in parts]
            return tuple(join(list(stream)) for stream in zip(*pieces, strict=True))
        outputs = proceed()
        for part in parts:
            kept = tuple(None if x is None else part.of(x, rows) for x in outputs)
            ledger.tracks[part.group].store(part.branch, at, part.of(hidden, rows), kept)
        ledger.weigh()
        return outputs

    def details(self, run: Run) -> Mapping[str, Any]:
        found = [ledger.statistics for ledger in self._ledgers(run).values()]
        if not found:
            return {}
        return {
            "modules": len(found),
            "computed": sum(sum(s.computed.values()) for s in found),
            "total": sum(sum(s.total.values()) for s in found),
            "skipped_steps": sorted({index for s in found for index in s.skipped}),
            "bytes_held": sum(s.peak_bytes for s in found),
        }
