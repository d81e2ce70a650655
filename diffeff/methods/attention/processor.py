"""The attention processor of UNets in slices: keys, queries, scores and output projection of one part at a time.

diffusers' own processor holds the queries, keys, values and outputs of a whole batch at once, and calls torch's
attention directly, past diffusers' dispatcher. This one keeps the keys and values of a few rows and a slice of
queries, and writes straight into the result. What it does not take it hands to the processor it replaced, unchanged:
masks, group norms, feature maps, and every call that somebody listens to (see `kernels.targets.listeners`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from diffeff.kernels.sliced_attention import sliced_attention
from diffeff.kernels.targets import listeners
from diffeff.kernels.temporal_attention import MAX_FRAMES, temporal_attention

__all__ = ["Counts", "SlicedProcessor"]

_MANY_ROWS = 1024
"""Short sequences in at least so many rows go to the kernel made for them, on CUDA."""


@dataclass
class Counts:
    """What the processors of one model did since the run began: calls computed here, calls handed on by reason."""

    calls: int = 0
    parts: int = 0
    handed_on: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.calls = self.parts = 0
        self.handed_on.clear()


class SlicedProcessor:
    """Computes an attention of a UNet exactly, at most `slice_tokens` query tokens at a time.

    Called by `Attention.forward` like any processor: hidden states [rows, tokens, channels] in and out. Diffusers
    builds processors from their class alone when it loads an IP-Adapter, hence the defaults.
    """

    def __init__(self, inner: Any = None, slice_tokens: int = 4096, counts: Counts | None = None) -> None:
        self.inner = AttnProcessor2_0() if inner is None else inner
        self.slice_tokens = slice_tokens
        self.counts = Counts() if counts is None else counts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        reason = _reason(attn, hidden_states, encoder_hidden_states, attention_mask)
        if reason or args:
            self.counts.handed_on[reason or "it was called with positional extras"] += 1
            result: Tensor = self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return result
        self.counts.calls += 1
        out = self._attend(attn, hidden_states, encoder_hidden_states)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor

    def _attend(self, attn: Any, hidden: Tensor, context: Tensor | None) -> Tensor:
        """The attention in parts of `slice_tokens`: several rows at once where they are short, else parts of a row."""
        rows, tokens, _ = hidden.shape
        many, few = max(1, self.slice_tokens // max(tokens, 1)), min(tokens, self.slice_tokens)
        if many >= rows and few >= tokens:
            self.counts.parts += 1
            return _part(attn, hidden, *_keys(attn, hidden if context is None else context))
        out: Tensor | None = None
        for row in range(0, rows, many):
            group = hidden[row : row + many]
            key, value = _keys(attn, group if context is None else context[row : row + many])
            for start in range(0, tokens, few):
                part = _part(attn, group[:, start : start + few], key, value)
                if out is None:
                    out = part.new_empty(rows, tokens, part.shape[-1])
                out[row : row + many, start : start + few] = part
                self.counts.parts += 1
        return hidden.new_empty(hidden.shape) if out is None else out


def _reason(attn: Any, hidden: Tensor, context: Tensor | None, mask: Tensor | None) -> str:
    """Why a call is handed to the processor that stood here before; empty where it is computed here."""
    if listeners():
        return "another method or guider acts at its seam"
    if mask is not None:
        return "it has a mask"
    if hidden.ndim != 3 or attn.group_norm is not None or attn.spatial_norm is not None:
        return "it normalises a feature map first"
    if context is not None and (attn.norm_cross or context.shape[0] != hidden.shape[0]):
        return "its context is normalised or broadcast"
    return ""


def _heads(attn: Any, x: Tensor) -> Tensor:
    """[rows, heads, tokens, head_dim], a view."""
    split: Tensor = x.unflatten(-1, (attn.heads, -1))
    return split.transpose(1, 2)


def _keys(attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    key = _heads(attn, attn.to_k(context))
    return key if attn.norm_k is None else attn.norm_k(key), _heads(attn, attn.to_v(context))


def _part(attn: Any, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query projection, attention and output projection of one part."""
    query = _heads(attn, attn.to_q(hidden))
    query = query if attn.norm_q is None else attn.norm_q(query)
    out = _kernel(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
    for layer in attn.to_out:
        out = layer(out)
    return out


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Few tokens in very many rows (attention over frames) go to the kernel made for them, the rest to SDPA's rule.

    There SDPA computes tiles of 128 queries for a handful, and its launch grid ends at 65,535 rows times heads.
    """
    if q.is_cuda and max(q.shape[2], k.shape[2]) <= MAX_FRAMES and len(q) >= _MANY_ROWS:
        # [rows, heads, frames, dim] seen as [1, frames, rows, heads, dim]
        q, k, v = (x.permute(2, 0, 1, 3)[None] for x in (q, k, v))
        return temporal_attention(q, k, v)[0].permute(1, 2, 0, 3)
    return sliced_attention(q, k, v)
