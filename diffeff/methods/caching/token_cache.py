"""Caching at the token site: at a cached step, modules compute some of their tokens and keep the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffeff.anatomy.types import AttentionSite, DenoiserMap, ModuleKind, ModuleSite
from diffeff.core.method import AttentionCall, Claim, Outputs
from diffeff.core.run import Clock, Run
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.module_cache import ATTENTIONS, MODULES, ModuleCache, ModuleLedger, Modules
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.caching.segment_cache import present_parts
from diffeff.methods.caching.token_scores import Score, Scoring, Shown, attended, chosen, entropies
from diffeff.methods.caching.track import Part

__all__ = ["PARTIAL", "TokenCache", "Tokens"]

PARTIAL: tuple[ModuleKind, ...] = ("cross", "feed_forward")
"""Modules whose output for a token follows from that token alone (and the text), so that some can be computed."""
_FUSED = ("proj_mlp", "proj_out")
"""The linear layers of a block whose feed-forward shares its last layer with the attention (Flux's single blocks)."""
Share = Callable[[ModuleSite, Clock, int], float]
"""(module, clock, blocks of the denoiser) -> share of its tokens to compute at this step."""


@dataclass(frozen=True)
class Tokens(Modules):
    """All attention and feed-forward modules of a transformer: cross-attention and feed-forward compute a `share` of
    their tokens at a cached step, self- and joint attention, where every token needs all others, are reused whole."""

    kinds: tuple[ModuleKind, ...] = MODULES
    share: Share = lambda site, clock, blocks: 1.0
    score: Score = "auto"
    scoring: Scoring = field(default_factory=Scoring)
    interval: int = 4

    def build(self, config: CacheConfig, recipe: Recipe) -> TokenCache:
        return TokenCache(config, recipe, self)


@dataclass
class TokenLedger(ModuleLedger):
    """What is remembered of one module, and of its tokens."""

    stale: dict[str, Tensor] = field(default_factory=dict)
    """Steps since each token was computed [rows, tokens], by branch."""
    picked: Tensor | None = None
    """The tokens computed at the present step [rows of the call, count]; None for all."""
    tokens: int = 0
    """Tokens computed at cached steps."""
    of: int = 0
    """Tokens there were at cached steps."""

    def renew(self) -> None:
        """The module is computed whole."""
        self.picked = None
        self.stale.clear()


class TokenCache(ModuleCache):
    """A module cache that computes some tokens of some modules at the steps it skips."""

    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SKIP_MODULE, Claim.TOKEN_COUNT})
    skipped: ClassVar[str] = "steps' tokens in part"
    ledger: ClassVar[type[ModuleLedger]] = TokenLedger
    site: Tokens

    # --- attach -------------------------------------------------------------------------------------------------
    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        super().bind(denoisers)
        for denoiser in denoisers:
            if not denoiser.residual:
                raise MethodInapplicable(
                    f"{self.config.name}: {denoiser.name} ({denoiser.family}) is a UNet, whose levels have tokens of "
                    "their own. Use pab or fora for its modules, or deepcache."
                )
            if not self._partial_sites(denoiser):
                raise MethodInapplicable(
                    f"{self.config.name}: {denoiser.name} ({denoiser.family}) has no cross-attention and no "
                    "feed-forward module that is known, so no tokens can be computed apart. fora reuses whole modules."
                )

    def _partial_sites(self, denoiser: DenoiserMap) -> list[str]:
        known = [m.name for m in self.module_sites(denoiser) if m.kind in PARTIAL]
        return [*known, *(path for path in self.linear_sites(denoiser) if path.endswith(_FUSED[1]))]

    def linear_sites(self, denoiser: DenoiserMap) -> tuple[str, ...]:
        fused = [b for b in denoiser.blocks if not b.feed_forward and all(hasattr(b.module, n) for n in _FUSED)]
        return tuple(f"{block.name}.{name}" for block in fused for name in _FUSED)

    def attention_sites(self, denoiser: DenoiserMap) -> tuple[AttentionSite, ...]:
        """One that shows the tokens' scores per block, by its kind."""
        if self.site.score == "random":
            return ()
        found: dict[tuple[int, bool], AttentionSite] = {}
        for site in denoiser.attentions:
            found.setdefault((site.block, site.kind == "cross"), site)
        return tuple(found.values())

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        whole = frozenset((*(m.name for m in self.module_sites(denoiser)), *self.linear_sites(denoiser)))
        return {Claim.SKIP_MODULE: whole, Claim.TOKEN_COUNT: frozenset(self._partial_sites(denoiser))}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        sites = self._partial_sites(denoiser)
        reused = sum(m.kind in ATTENTIONS and m.name not in sites for m in self.module_sites(denoiser))
        return f"tokens of {len(sites)} modules of {denoiser.name} can be computed in part, {reused} are reused whole"

    # --- seams --------------------------------------------------------------------------------------------------
    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[..., Outputs]) -> Outputs:
        ledger = self._token_ledger(run, site)
        if self._only_counted(ledger, present_parts(run)[0], self._moment(run)):
            return proceed()
        if self._must_run(run, site, ledger, hidden):
            ledger.renew()
            outputs = self._whole(run, site, proceed)
            self._keep(run, ledger, hidden, outputs)
            return outputs
        if site.kind not in PARTIAL or hidden.ndim != 3:
            return self._held(run, ledger)
        self._pick(run, site, ledger, hidden)
        return self._partly(run, ledger, hidden, proceed)

    def _partly(self, run: Run, ledger: TokenLedger, hidden: Tensor, proceed: Callable[[Tensor], Outputs]) -> Outputs:
        """The chosen tokens computed, the others held; what comes out is kept."""
        if ledger.picked is None:
            outputs = proceed(hidden)
        elif not ledger.picked.shape[1]:
            return self._held(run, ledger)
        else:
            some = proceed(_gather(hidden, ledger.picked))[0]
            outputs = (self._merged(run, ledger, some),)
        self._keep(run, ledger, hidden, outputs)
        return outputs

    def around_linear(
        self, run: Run, site: str, module: nn.Module, x: Tensor, proceed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if run.call is None:
            return proceed(x)
        path, _, name = site.rpartition(".")
        block = next(b for b in run.call.denoiser.blocks if b.name == path)
        whole = ModuleSite(f"{path}.{_FUSED[1]}", block.module, "feed_forward", block.index)
        ledger = self._token_ledger(run, whole)
        if self.recipe.exact:
            if name == _FUSED[1]:
                self._only_counted(ledger, present_parts(run)[0], self._moment(run))
            return proceed(x)
        if name == _FUSED[0]:
            return self._first_linear(run, whole, ledger, x, proceed)
        (found,) = self._partly(run, ledger, x, lambda tokens: (proceed(tokens),))
        if found is None:
            raise RuntimeError(f"{self.config.name}: {site} put out nothing")
        return found

    def _first_linear(
        self, run: Run, site: ModuleSite, ledger: TokenLedger, x: Tensor, proceed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The layer before the activation: tokens that the last layer will not read are left at zero."""
        if self._must_run(run, site, ledger, x):
            ledger.renew()
        else:
            self._pick(run, site, ledger, x)
        if ledger.picked is None:
            return proceed(x)
        some = proceed(_gather(x, ledger.picked))
        empty = some.new_zeros(*x.shape[:-1], some.shape[-1])
        return _scatter(empty, ledger.picked, some)

    def around_attention(
        self, run: Run, site: AttentionSite, call: AttentionCall, proceed: Callable[[AttentionCall], Tensor]
    ) -> Tensor:
        shown = self._shown_by(run, site.block)
        if shown.recording and run.call is not None:
            parts, rows = present_parts(run)
            found = entropies(call) if site.kind == "cross" else attended(call)
            kept = shown.entropy if site.kind == "cross" else shown.mass
            kept.update({part.branch: part.of(found, rows) for part in parts})
            if site.kind != "cross":
                shown.grid = run.call.denoiser.grid(site, call.q.shape[2], run.call.arguments)
        return proceed(call)

    def _whole(self, run: Run, site: ModuleSite, proceed: Callable[..., Outputs]) -> Outputs:
        """The module computed, its attention watched."""
        shown = self._shown_by(run, site.block)
        shown.recording = True
        try:
            return proceed()
        finally:
            shown.recording = False

    # --- tokens -------------------------------------------------------------------------------------------------
    def _pick(self, run: Run, site: ModuleSite, ledger: TokenLedger, hidden: Tensor) -> None:
        """Choose the tokens of this step, and note which grow stale."""
        if run.call is None:
            raise RuntimeError(f"{self.config.name}: a module was reached outside a denoiser call")
        (parts, rows), tokens = present_parts(run), hidden.shape[1]
        share = self.site.share(site, run.clock, len(run.call.denoiser.blocks))
        count = min(max(int(share * tokens + 0.5), 0), tokens)
        ledger.tokens += count
        ledger.of += tokens
        ledger.picked = None
        if count < tokens:
            picked = [self._pick_part(run, site, ledger, part, part.of(hidden, rows), count) for part in parts]
            ledger.picked = torch.cat(picked)

    def _pick_part(
        self, run: Run, site: ModuleSite, ledger: TokenLedger, part: Part, hidden: Tensor, count: int
    ) -> Tensor:
        stale = ledger.stale.get(part.branch)
        if stale is None:
            stale = torch.zeros(hidden.shape[:2], dtype=torch.int32, device=hidden.device)
        shown = self._shown_by(run, site.block)
        place = shown.place(hidden.shape[1], site.name.endswith("context"))
        base = self._random(run, hidden) if self.site.score == "random" else None
        if base is None:
            base = shown.base(self.site.score, part.branch, hidden, place)
        picked = chosen(self.site.scoring(base, stale, self.site.interval, place), count)
        ledger.stale[part.branch] = (stale + 1).scatter(1, picked, 0)
        return picked

    @staticmethod
    def _random(run: Run, hidden: Tensor) -> Tensor:
        """The same draw for all modules of a step, and for all runs."""
        draw = torch.Generator().manual_seed(run.clock.index)
        return torch.rand(hidden.shape[1], generator=draw).to(hidden.device).expand(hidden.shape[:2])

    # --- what is kept -------------------------------------------------------------------------------------------
    def _merged(self, run: Run, ledger: TokenLedger, some: Tensor | None) -> Tensor:
        """What is held, with the tokens that were computed in their places."""
        (held,) = self._held(run, ledger)
        if held is None or some is None or ledger.picked is None:
            raise RuntimeError(f"{self.config.name}: a module's output was not kept")
        return _scatter(held, ledger.picked, some)

    def _token_ledger(self, run: Run, site: ModuleSite) -> TokenLedger:
        found = self._module_ledger(run, site)
        if not isinstance(found, TokenLedger):
            raise TypeError(f"{self.config.name}: ledgers of tokens are of type TokenLedger")
        return found

    def _shown_by(self, run: Run, block: int) -> Shown:
        name = "" if run.call is None else run.call.denoiser.name
        return run.state(self, Shown, site=f"shown {name} {block}", branch="")

    def details(self, run: Run) -> Mapping[str, Any]:
        ledgers = [found for found in self._ledgers(run).values() if isinstance(found, TokenLedger)]
        tokens, of = sum(found.tokens for found in ledgers), sum(found.of for found in ledgers)
        return {**super().details(run), "tokens_computed_in_part": tokens, "tokens_in_part": of}


def _gather(x: Tensor, picked: Tensor) -> Tensor:
    return x.gather(1, picked[..., None].expand(-1, -1, x.shape[-1]))


def _scatter(held: Tensor, picked: Tensor, some: Tensor) -> Tensor:
    return held.scatter(1, picked[..., None].expand(-1, -1, some.shape[-1]), some)
