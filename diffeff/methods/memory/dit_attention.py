"""Attention of a slice of queries against keys and values that were gathered slice by slice.

Softmax rows are independent, so a slice of queries gives the same rows as all queries at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffeff.errors import PlanConflict

__all__ = ["Attention", "Projections", "check_processor", "heads_across", "heads_each", "legacy_mask", "rotate"]

Rows = slice
Heads = Callable[[Tensor, nn.Module | None, Rows], Tensor]
"""A projection's output [batch, tokens, channels] with its norm and rotary embedding, [batch, tokens, heads, dim]."""


# --- heads --------------------------------------------------------------------------------------------------------
def heads_each(heads: int, rope: Callable[[Tensor, Rows], Tensor] | None = None) -> Heads:
    """Each head normalised for itself, then rotated: `rope` takes [batch, tokens, heads, dim] and the rows."""

    def split(x: Tensor, norm: nn.Module | None, rows: Rows) -> Tensor:
        x = x.unflatten(2, (heads, -1))
        x = x if norm is None else norm(x)
        return x if rope is None else rope(x, rows)

    return split


def heads_across(heads: int, rope: Callable[[Tensor, Rows], Tensor] | None = None, flat: bool = False) -> Heads:
    """Normalised across all heads, then split and rotated (`flat`: rotated before they are split)."""

    def split(x: Tensor, norm: nn.Module | None, rows: Rows) -> Tensor:
        x = x if norm is None else norm(x)
        if flat and rope is not None:
            x, turn = rope(x, rows), None
        else:
            turn = rope
        x = x.unflatten(2, (heads, -1))
        return x if turn is None else turn(x, rows)

    return split


def rotate(frequencies: Any, start: int = 0) -> Callable[[Tensor, Rows], Tensor] | None:
    """Rotary embedding in diffusers' common form: (cos, sin), [tokens, dim] each; the stream begins at `start`."""
    if frequencies is None:
        return None
    from diffusers.models.embeddings import apply_rotary_emb

    cos, sin = frequencies

    def rope(x: Tensor, rows: Rows) -> Tensor:
        at = slice(start + rows.start, start + rows.stop)
        tables: Any = cos[at], sin[at]
        rotated: Any = apply_rotary_emb(x, tables, sequence_dim=1)
        return rotated  # type: ignore[no-any-return]  # diffusers says a tuple, and gives a tensor

    return rope


# --- one attention ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Projections:
    """How one stream goes into an attention and out of it. `at`: where its tokens begin among the keys."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    heads: Heads
    out: Callable[[Tensor], Tensor]
    at: int = 0

    @classmethod
    def of(cls, attn: Any, heads: Heads, at: int = 0) -> Projections:
        """The stream that attention modules of diffusers call the sample."""
        norms = getattr(attn, "norm_q", None), getattr(attn, "norm_k", None)
        return cls(attn.to_q, attn.to_k, attn.to_v, *norms, heads, _sequence(getattr(attn, "to_out", None)), at)

    @classmethod
    def added(cls, attn: Any, heads: Heads, at: int) -> Projections:
        """The other stream of a joint attention: the text."""
        norms = getattr(attn, "norm_added_q", None), getattr(attn, "norm_added_k", None)
        out = getattr(attn, "to_add_out", None)
        return cls(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, *norms, heads, out or _same, at)

    def query(self, hidden: Tensor, rows: Rows) -> Tensor:
        return self.heads(self.q(hidden), self.norm_q, rows)

    def key_value(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        k = self.heads(self.k(hidden), self.norm_k, rows)
        return k, self.v(hidden).unflatten(2, (k.shape[2], -1))


def _same(x: Tensor) -> Tensor:
    return x


def _sequence(layers: Any) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        for layer in layers or ():
            x = layer(x)
        return x

    return apply


class Attention:
    """One attention whose keys and values are gathered from one or more streams, or given once for cross-attention.

    Holds k and v, [batch, keys, heads, dim] each, for one call of a block. `mask`: as the processor would pass it,
    broadcast over queries or [..., queries of the joint sequence, keys].
    """

    def __init__(self, attn: Any, streams: Sequence[Projections], keys: int, mask: Tensor | None = None) -> None:
        self.attn, self.streams, self.keys, self.mask = attn, streams, keys, mask
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def gather(self, stream: int, hidden: Tensor, rows: Rows) -> None:
        """Keep the keys and values of these rows."""
        projections = self.streams[stream]
        k, v = projections.key_value(hidden, rows)
        if self.k is None or self.v is None:
            self.k = k.new_empty((k.shape[0], self.keys, *k.shape[2:]))
            self.v = v.new_empty((v.shape[0], self.keys, *v.shape[2:]))
        at = slice(projections.at + rows.start, projections.at + rows.stop)
        self.k[:, at], self.v[:, at] = k, v

    def given(self, context: Tensor) -> Attention:
        """Keys and values of a cross-attention, from the whole context."""
        self.k, self.v = self.streams[0].key_value(context, slice(0, context.shape[1]))
        return self

    def __call__(self, stream: int, hidden: Tensor, rows: Rows) -> Tensor:
        """What the attention puts out for these rows, behind its output projection."""
        projections = self.streams[stream]
        at = slice(projections.at + rows.start, projections.at + rows.stop)
        return projections.out(self.mixed(projections.query(hidden, rows), at))

    def mixed(self, query: Tensor, at: Rows) -> Tensor:
        """softmax(q k) v of the queries at `at` of the joint sequence, heads joined: [batch, tokens, channels]."""
        if self.k is None or self.v is None:
            raise RuntimeError("no keys were gathered")
        mask = self.mask
        if mask is not None and mask.ndim > 2 and mask.shape[-2] > 1:
            mask = mask[..., at, :]
        return attend(self.attn, query, self.k, self.v, mask)


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The kernel that the module's processor would reach, [batch, tokens, heads, dim] in, heads joined out: diffusers'
    dispatcher with the backend set on the processor, or plain scaled_dot_product_attention."""
    processor = attn.processor
    if hasattr(processor, "_attention_backend"):
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        mixed: Tensor = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=processor._attention_backend)
        return mixed.flatten(2, 3).to(q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(2, 3).to(q.dtype)


def legacy_mask(attn: Any, mask: Tensor | None, keys: int, batch: int) -> Tensor | None:
    """The mask as diffusers' older processors shape it: [batch, heads, 1 or queries, keys]."""
    if mask is None:
        return None
    ready = attn.prepare_attention_mask(mask, keys, batch)
    return ready.view(batch, attn.heads, -1, ready.shape[-1])  # type: ignore[no-any-return]


# --- refusals -----------------------------------------------------------------------------------------------------
def check_processor(attn: Any, path: str, known: Sequence[str]) -> None:
    """Raise PlanConflict when the attention does something that slices would not do as well."""
    processor = attn.processor
    name = type(processor).__name__
    if name not in known or not type(processor).__module__.startswith("diffusers."):
        raise PlanConflict(
            f"{path} runs the attention processor {name}, which feature_slicing does not know (known here: "
            f"{', '.join(known)}). Restore diffusers' own processor (set_attn_processor), or leave feature_slicing out."
        )
    if getattr(attn, "fused_projections", False):
        raise PlanConflict(f"{path} has fused projections: call unfuse_qkv_projections() before feature_slicing.")
    if getattr(processor, "_parallel_config", None) is not None:
        raise PlanConflict(
            f"{path} runs under context parallelism, which already splits the tokens over devices: feature_slicing "
            "needs the keys of all tokens on one. Use one of the two."
        )
