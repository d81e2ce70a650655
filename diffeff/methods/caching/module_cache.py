"""Caching at the module site: outputs of attention and feed-forward modules, by kind, in all blocks or some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from diffeff.anatomy.types import DenoiserMap, ModuleKind, ModuleSite
from diffeff.core.method import Claim, Layer, Outputs
from diffeff.core.run import Clock, Run
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.cache import CacheMethod, Ledger, join
from diffeff.methods.caching.policy import Policy
from diffeff.methods.caching.predictor import Predictor
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import present_parts
from diffeff.methods.caching.track import Track

__all__ = ["ATTENTIONS", "MODULES", "ModuleCache", "Modules"]

ATTENTIONS: tuple[ModuleKind, ...] = ("self", "cross", "joint", "temporal")
MODULES: tuple[ModuleKind, ...] = (*ATTENTIONS, "feed_forward")


@dataclass(frozen=True)
class Modules:
    """The modules of these kinds, in blocks `first_block` to `last_block` (None: to the end). Their outputs stand
    before the gate and the residual sum, so that both follow the present step.

    `rule` gives modules policies of their own, by site and timestep list, in place of the recipe's; `predictor` makes
    one that follows the run's length in place of the recipe's. Both are asked once per run and module.
    """

    kinds: tuple[ModuleKind, ...]
    first_block: int = 0
    last_block: int | None = None
    rule: Callable[[ModuleSite, Clock], Policy] | None = None
    predictor: Callable[[Clock], Predictor] | None = None

    def build(self, config: CacheConfig, recipe: Recipe) -> ModuleCache:
        return ModuleCache(config, recipe, self)

    def holds(self, site: ModuleSite) -> bool:
        """Whether the site is one of them."""
        stop = float("inf") if self.last_block is None else self.last_block
        return site.kind in self.kinds and self.first_block <= site.block <= stop


@dataclass
class ModuleLedger(Ledger):
    """What is remembered of one module."""

    kind: str = ""


class ModuleCache(CacheMethod):
    """Predicts the outputs of modules. Each decides for itself; under rules that count steps all agree."""

    layer: ClassVar[Layer] = Layer.MODULE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_MODULE})
    skipped: ClassVar[str] = "steps' modules"
    ledger: ClassVar[type[ModuleLedger]] = ModuleLedger

    def __init__(self, config: CacheConfig, recipe: Recipe, site: Modules) -> None:
        super().__init__(config, recipe)
        self.site = site

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        super().bind(denoisers)
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
        ledger = self._module_ledger(run, site)
        if self._only_counted(ledger, present_parts(run)[0], self._moment(run)):
            return proceed()
        if not self._must_run(run, site, ledger, hidden):
            return self._held(run, ledger)
        outputs = proceed()
        self._keep(run, ledger, hidden, outputs)
        return outputs

    def _module_ledger(self, run: Run, site: ModuleSite) -> ModuleLedger:
        """What is remembered of one module."""
        if run.call is None:
            raise RuntimeError(f"{self.config.name}: a module was reached outside a denoiser call")
        make = lambda: self.ledger(vault=self._vault(run), ranks=self._ranks(run), kind=site.kind)  # noqa: E731
        return run.state(self, make, site=f"{run.call.denoiser.name}.{site.name}", branch="")

    def _must_run(self, run: Run, site: ModuleSite, ledger: ModuleLedger, hidden: Tensor) -> bool:
        """Whether the module must be computed at this step."""
        at, (parts, rows) = self._moment(run), present_parts(run)
        for part in parts:
            if part.group not in ledger.tracks:
                ledger.add(part.group, self._new_track(run, site))
        todo = self._to_compute(ledger, parts, at, lambda part: self._shown(run, part.of(hidden, rows)))
        self._count(ledger.statistics, parts, parts if todo else [], at)
        return bool(todo)

    def _held(self, run: Run, ledger: ModuleLedger) -> Outputs:
        """What the module is predicted to put out."""
        at, (parts, _) = self._moment(run), present_parts(run)
        pieces = [ledger.tracks[p.group].predict(p.branch, at) for p in parts]
        return tuple(join(list(stream)) for stream in zip(*pieces, strict=True))

    def _keep(self, run: Run, ledger: ModuleLedger, hidden: Tensor, outputs: Outputs) -> None:
        """The module's input, and what it put out."""
        at, (parts, rows) = self._moment(run), present_parts(run)
        for part in parts:
            kept = tuple(None if x is None else part.of(x, rows) for x in outputs)
            ledger.tracks[part.group].store(part.branch, at, part.of(hidden, rows), kept)
        ledger.weigh()

    def _new_track(self, run: Run, site: ModuleSite) -> Track:
        """The memory of one module."""
        recipe, choice = self.recipe, self.site
        rules = recipe.rules
        if choice.rule is not None:
            rules = replace(recipe, policy=choice.rule(site, run.clock)).rules
        predictor = recipe.predictor if choice.predictor is None else choice.predictor(run.clock)
        indicator = None if recipe.indicator is None else recipe.indicator()
        return Track(rules, predictor, indicator, recipe.feedback)

    def details(self, run: Run) -> Mapping[str, Any]:
        ledgers = [ledger for ledger in self._ledgers(run).values() if isinstance(ledger, ModuleLedger)]
        found = [ledger.statistics for ledger in ledgers]
        if not found:
            return {}
        kinds = dict.fromkeys(ledger.kind for ledger in ledgers)
        return {
            "modules": len(found),
            "computed": sum(sum(s.computed.values()) for s in found),
            "total": sum(sum(s.total.values()) for s in found),
            "skipped_steps": sorted({index for s in found for index in s.skipped}),
            "skipped_by_kind": {
                kind: sorted({i for own in ledgers if own.kind == kind for i in own.statistics.skipped})
                for kind in kinds
            },
            "bytes_held": sum(s.peak_bytes for s in found),
            "decided": self.decides,
            **self._memory(run),
        }
