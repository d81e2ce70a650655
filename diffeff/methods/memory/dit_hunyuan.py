"""HunyuanVideo's blocks: two streams, then both as one; and the variants whose first frame is modulated apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffeff.methods.memory.dit_attention import Attention, Projections, heads_each, rotate
from diffeff.methods.memory.dit_engine import Stage, Work
from diffeff.methods.memory.dit_joint import feed_forwards, modulated, single

__all__ = ["hunyuan", "hunyuan_single"]

Rows = slice
Table = Callable[[int, Rows], Tensor]
"""One shift, scale or gate by number, for the given rows: [batch, 1 or tokens, channels]."""


def hunyuan(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
    **_: Any,
) -> Work:
    """HunyuanVideoTransformerBlock and its token-replace variant: image first, then text."""
    attn, norms = block.attn, (block.norm1, block.norm1_context)
    first = token_replace_emb if _replaces(block) else None
    image = _tables(norms[0], 6, temb, first, num_tokens)
    tables = (image, _tables(norms[1], 6, temb))
    tokens, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
    own = Attention(
        attn,
        [
            Projections.of(attn, heads_each(attn.heads, rotate(freqs_cis))),
            Projections.added(attn, heads_each(attn.heads), tokens),
        ],
        tokens + text,
        attention_mask,
    )

    def whole(hiddens: list[Tensor]) -> Sequence[Tensor]:
        return attn(  # type: ignore[no-any-return]
            hidden_states=hiddens[0],
            encoder_hidden_states=hiddens[1],
            attention_mask=attention_mask,
            image_rotary_emb=freqs_cis,
        )

    attention = Stage(
        modules=(attn,),
        enter=lambda s, x, rows: modulated(norms[s].norm, x, tables[s](1, rows), tables[s](0, rows)),
        apply=own,
        leave=lambda s, x, hidden, y, rows: x + y * tables[s](2, rows),
        whole=whole,
        gather=own.gather,
    )
    later = (block.norm2, block.norm2_context)
    feed = feed_forwards(
        [block.ff, block.ff_context],
        lambda s, x, rows: modulated(later[s], x, tables[s](4, rows), tables[s](3, rows)),
        lambda s, x, hidden, y, rows: x + tables[s](5, rows) * y,
    )
    width = hidden_states.shape[2]
    return Work([hidden_states, encoder_hidden_states], [attention, feed], tuple, 2 * width)


def hunyuan_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
    **_: Any,
) -> Work:
    """HunyuanVideoSingleTransformerBlock and its token-replace variant."""
    attn, tokens = block.attn, hidden_states.shape[1]
    first = token_replace_emb if _replaces(block) else None
    image, text = _tables(block.norm, 3, temb, first, num_tokens), _tables(block.norm, 3, temb)
    own = Attention(
        attn,
        [
            Projections.of(attn, heads_each(attn.heads, rotate(image_rotary_emb))),
            Projections.of(attn, heads_each(attn.heads), tokens),
        ],
        tokens + encoder_hidden_states.shape[1],
        attention_mask,
    )

    def whole(hiddens: list[Tensor]) -> Sequence[Tensor]:
        return attn(  # type: ignore[no-any-return]
            hidden_states=hiddens[0],
            encoder_hidden_states=hiddens[1],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )

    streams = [hidden_states, encoder_hidden_states]
    return single(block, streams, own, lambda i, s, rows: (image, text)[s](i, rows), whole, tuple)


def _replaces(block: Any) -> bool:
    return "TokenReplace" in type(block).__name__


def _tables(norm: Any, count: int, temb: Tensor, first: Tensor | None = None, tokens: int | None = None) -> Table:
    """The modulation of one stream; `first`: the conditioning of the `tokens` first tokens, where it is another."""
    fixed: tuple[Tensor, ...] = norm.linear(norm.silu(temb)).chunk(count, dim=1)
    if first is None or tokens is None:
        return lambda i, rows: fixed[i][:, None]
    other: tuple[Tensor, ...] = norm.linear(norm.silu(first)).chunk(count, dim=1)

    def table(i: int, rows: Rows) -> Tensor:
        early = max(min(rows.stop, tokens) - rows.start, 0)
        late = rows.stop - rows.start - early
        if not early or not late:
            return (other if early else fixed)[i][:, None]
        parts = other[i][:, None].expand(-1, early, -1), fixed[i][:, None].expand(-1, late, -1)
        return torch.cat(parts, dim=1)

    return table
