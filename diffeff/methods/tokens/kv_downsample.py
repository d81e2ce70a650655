"""Fewer keys and values in self-attention: strided over the grid of image tokens, every query kept.

Source: ToDo (arXiv 2402.13573), which samples the hidden states of UNets before the key and value projections. Here
keys and values are sampled after projection and rotary embedding, so that positions stay true and the same code
serves transformers; the bias that keeps the balance of text and image in joint attention is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffeff.anatomy.types import AttentionSite, DenoiserMap, Grid
from diffeff.core.config import Config, knob
from diffeff.core.method import AttentionCall, Claim, Layer, Method
from diffeff.core.run import Run
from diffeff.errors import ConfigError, MethodInapplicable

__all__ = ["KVDownsample", "Selection", "select"]

_KINDS = ("self", "joint")


@dataclass(frozen=True, kw_only=True)
class KVDownsample(Config):
    """Faster self-attention at high resolution: each query looks at every `stride`-th row and column of keys only.

    Acts on self- and joint attention; cross- and temporal attention and text keys are never touched. The score and
    value products shrink by stride**2 * temporal_stride; nothing else does, so the gain grows with the number of
    tokens and is nil below about a thousand. Costs fine detail (keys inside a cell are represented by one of them)
    and no memory. `stride=1, temporal_stride=1` is bit-exact.

    Of each cell the centre is kept (row `i*s + size // 2`, nearest-exact: on average no shift of the picture), of each
    temporal cell the first frame (causal video codecs put the key frame, and image conditions, at frame 0).
    """

    name: ClassVar[str] = "kv_downsample"
    summary: ClassVar[str] = "Faster self-attention at high resolution: fewer keys and values, all queries kept."

    stride: int = knob(2, "keep every n-th row and column of keys", low=1, high=8, step=1)
    temporal_stride: int = knob(1, "keep the keys of every n-th latent frame", low=1, high=8, step=1)
    min_tokens: int = knob(1024, "leave attentions with fewer image tokens alone", low=0, step=256)
    top_resolution: bool = knob(True, "act only where the grid is finest (the outer levels of a UNet)")
    start: float = knob(0.0, "progress of the run at which it begins", low=0.0, high=1.0, step=0.05)
    stop: float = knob(1.0, "progress of the run at which it ends", low=0.0, high=1.0, step=0.05)
    first_block: int = knob(0, "first block to act on", low=0, step=1)
    last_block: int = knob(-1, "last block to act on; -1 is the last of the model", low=-1, step=1)

    def check(self) -> None:
        if self.stop <= self.start:
            raise ConfigError(f"kv_downsample.stop is {self.stop}; it must be greater than start ({self.start})")
        if 0 <= self.last_block < self.first_block:
            raise ConfigError(
                f"kv_downsample.last_block is {self.last_block}; allowed: -1, or at least first_block "
                f"({self.first_block})"
            )

    def build(self) -> KVDownsampleMethod:
        return KVDownsampleMethod(self)


@dataclass(frozen=True)
class Selection:
    """Which keys of a sequence stay, and how many tokens each stands for.

    `index`: int64 [kept], ascending positions in the sequence, text included. `weight`: float32 [kept], the number of
    tokens in the cell of each key; 1 for text.
    """

    index: Tensor
    weight: Tensor
    even: bool
    """Whether all kept keys stand for the same number of tokens: then softmax cancels the bias, and none is needed."""

    @property
    def bias(self) -> Tensor | None:
        """log(weight), to be added to the scores: one key then has the softmax mass of the cell it stands for."""
        return None if self.even else self.weight.log()

    def to(self, device: torch.device) -> Selection:
        return replace(self, index=self.index.to(device), weight=self.weight.to(device))


def select(grid: Grid, stride: int, temporal_stride: int = 1) -> Selection:
    """The keys to keep of a sequence laid out as `grid` (frames outermost, then rows, then columns; text before or
    after), `ceil(height / stride) * ceil(width / stride)` in every `temporal_stride`-th frame.

    A sequence of image tokens only gets no bias when height or width do not divide: the smaller cells at the border
    then count a little too much, in exchange for an attention without mask, which fused kernels run faster.
    """
    t, nt = _axis(grid.frames, temporal_stride, centred=False)
    y, ny = _axis(grid.height, stride)
    x, nx = _axis(grid.width, stride)
    index = ((t[:, None, None] * grid.height + y[:, None]) * grid.width + x).flatten()
    weight = (nt[:, None, None] * ny[:, None] * nx).flatten().float()
    if not grid.text:
        return Selection(index, weight, even=True)
    text, ones = torch.arange(grid.text), torch.ones(grid.text)
    if grid.text_first:
        return Selection(torch.cat([text, index + grid.text]), torch.cat([ones, weight]), even=False)
    return Selection(torch.cat([index, text + grid.image_tokens]), torch.cat([weight, ones]), even=False)


def _axis(size: int, stride: int, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Kept positions and cell sizes along one axis; the last cell is smaller where the stride does not divide."""
    first = torch.arange(0, size, stride)
    count = (size - first).clamp(max=stride)
    return (first + count // 2 if centred else first), count


def _reduced_mask(mask: Tensor | None, chosen: Selection, dtype: torch.dtype) -> Tensor | None:
    """The mask for the kept keys (`mask` is bool, True where allowed, or additive), with the bias added."""
    kept = mask if mask is None or mask.shape[-1] == 1 else mask.index_select(-1, chosen.index)
    if chosen.bias is None:
        return kept
    bias = chosen.bias.to(dtype)[None, None, None]
    if kept is None:
        return bias
    if kept.dtype is torch.bool:
        return torch.where(kept, bias, float("-inf"))
    return kept + bias.to(kept.dtype)


@dataclass
class _Ledger:
    """What one run did: selections by grid, tokens of the finest grid seen, key counts and reasons by site."""

    selections: dict[tuple[Grid, torch.device], Selection] = field(default_factory=dict)
    finest: int = 0
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    calls: int = 0


class KVDownsampleMethod(Method[KVDownsample]):
    """Samples k and v at the attention seam and adds the balancing bias through the mask."""

    layer: ClassVar[Layer] = Layer.TOKENS
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.KEY_COUNT})

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if not any(self.attention_sites(d) for d in denoisers):
            blocks = ", ".join(f"{d.name}: {len(d.blocks)}" for d in denoisers)
            raise MethodInapplicable(
                f"kv_downsample finds no self- or joint attention in blocks {self.config.first_block} to "
                f"{self.config.last_block} (blocks there are: {blocks})"
            )

    def attention_sites(self, denoiser: DenoiserMap) -> tuple[AttentionSite, ...]:
        last = len(denoiser.blocks) - 1 if self.config.last_block < 0 else self.config.last_block
        blocks = range(self.config.first_block, last + 1)
        return tuple(s for s in denoiser.attentions if s.kind in _KINDS and s.block in blocks)

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.KEY_COUNT: frozenset(s.name for s in self.attention_sites(denoiser))}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        return f"keys and values of {len(self.attention_sites(denoiser))} self-attentions can be strided"

    def around_attention(
        self, run: Run, site: AttentionSite, call: AttentionCall, proceed: Callable[[AttentionCall], Tensor]
    ) -> Tensor:
        config, ledger = self.config, self._ledger(run)
        if not config.start <= run.clock.fraction < config.stop:
            return proceed(call)
        grid = self._grid(run, site, call, ledger)
        if grid is None:
            return proceed(call)
        chosen = self._selection(ledger, grid, call.k.device)
        ledger.calls += 1
        ledger.keys[site.name] = (call.k.shape[2], len(chosen.index))
        ledger.left.pop(site.name, None)
        k, v = call.k.index_select(2, chosen.index), call.v.index_select(2, chosen.index)
        mask = _reduced_mask(call.options.get("attn_mask"), chosen, call.q.dtype)
        return proceed(AttentionCall(call.q, k, v, {**call.options, "attn_mask": mask}))

    def _grid(self, run: Run, site: AttentionSite, call: AttentionCall, ledger: _Ledger) -> Grid | None:
        """The grid of a site that is to be sampled; None, with the reason noted, where it is to be left alone."""
        queries, keys = call.q.shape[2], call.k.shape[2]
        grid = None if run.call is None else run.call.denoiser.grid(site, queries, run.call.arguments)
        reason = self._obstacle(grid, queries, keys, call, ledger)
        if reason is None:
            return grid
        if site.name not in ledger.keys:
            ledger.left[site.name] = reason
        return None

    def _obstacle(self, grid: Grid | None, queries: int, keys: int, call: AttentionCall, ledger: _Ledger) -> str | None:
        """Why this attention is to be left alone."""
        config = self.config
        if grid is None:
            return "the grid of its tokens is unknown"
        if not queries == keys == grid.image_tokens + grid.text:
            return f"{queries} queries and {keys} keys do not lie on the grid {grid}"
        if call.options.get("is_causal"):
            return "it is causal"
        ledger.finest = max(ledger.finest, grid.image_tokens)
        if grid.image_tokens < config.min_tokens:
            return f"fewer than min_tokens={config.min_tokens} image tokens"
        if config.top_resolution and grid.image_tokens < ledger.finest:
            return "not at the finest resolution (top_resolution=true)"
        if max(grid.height, grid.width) == 1 or config.stride == 1:
            single = grid.frames == 1 or config.temporal_stride == 1
            return "the stride keeps every key" if single else None
        return None

    def _selection(self, ledger: _Ledger, grid: Grid, device: torch.device) -> Selection:
        key = (grid, device)
        if key not in ledger.selections:
            ledger.selections[key] = select(grid, self.config.stride, self.config.temporal_stride).to(device)
        return ledger.selections[key]

    def _ledger(self, run: Run) -> _Ledger:
        return run.state(self, _Ledger, branch="")

    def engaged(self, run: Run) -> tuple[bool, str]:
        ledger = self._ledger(run)
        if ledger.keys:
            before, after = (max(pair[i] for pair in ledger.keys.values()) for i in (0, 1))
            return True, f"{len(ledger.keys)} attentions, at most {before} keys each cut to {after}"
        reasons = sorted(set(ledger.left.values())) or ["no attention was reached inside the window start..stop"]
        largest = f"; the largest has {ledger.finest} image tokens" if ledger.finest else ""
        return False, "; ".join(reasons) + largest

    def details(self, run: Run) -> Mapping[str, Any]:
        ledger = self._ledger(run)
        reasons = sorted(set(ledger.left.values()))
        return {
            "attentions": len(ledger.keys),
            "calls": ledger.calls,
            "keys": {site: list(pair) for site, pair in ledger.keys.items()},
            "left": {r: [s for s, why in ledger.left.items() if why == r] for r in reasons},
        }
