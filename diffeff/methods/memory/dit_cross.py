"""Blocks with one stream, self-attention and cross-attention to the text: Wan, LTX-Video, PixArt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.methods.memory.dit_attention import Attention, Projections, attend, heads_across, heads_each, legacy_mask
from diffeff.methods.memory.dit_engine import Stage, Work

__all__ = ["ltx", "pixart", "wan"]

Rows = slice
Tables = Callable[[int, Rows], Tensor]
"""One of the shifts, scales and gates of a block, by number: [batch, 1 or tokens of the rows, channels]."""


def _rows(x: Tensor, rows: Rows) -> Tensor:
    return x if x.shape[1] == 1 else x[:, rows]


def _single(result: Tensor) -> list[Any]:
    return [result]


def feed_forward(block: Any, ff: nn.Module, norm: Callable[[Tensor, Rows], Tensor], leave: Any) -> Stage:
    """The feed-forward of a block with one stream."""
    return Stage(
        modules=(ff,),
        enter=lambda stream, x, rows: norm(x, rows),
        apply=lambda stream, hidden, rows: ff(hidden),
        leave=leave,
        whole=lambda hiddens: [ff(hiddens[0])],
    )


# --- Wan ----------------------------------------------------------------------------------------------------------
def wan(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any = None) -> Work:
    """WanTransformerBlock. `temb`: [batch, 6, channels], or [batch, tokens, 6, channels] (Wan 2.2 TI2V)."""
    width = hidden_states.shape[2]
    table = _wan_tables(block.scale_shift_table, temb)
    own = Attention(
        block.attn1,
        [Projections.of(block.attn1, heads_across(block.attn1.heads, _wan_rope(rotary_emb)))],
        hidden_states.shape[1],
    )
    attention = Stage(
        modules=(block.attn1,),
        enter=lambda _, x, rows: _wan_modulated(block.norm1, x, table(0, rows), table(1, rows)),
        gather=own.gather,
        apply=own,
        leave=lambda _, x, hidden, y, rows: (x.float() + y * table(2, rows)).type_as(x),
        whole=lambda hiddens: _single(block.attn1(hiddens[0], None, None, rotary_emb)),
    )
    feed = feed_forward(
        block,
        block.ffn,
        lambda x, rows: _wan_modulated(block.norm3, x, table(3, rows), table(4, rows)),
        lambda _, x, hidden, y, rows: (x.float() + y.float() * table(5, rows)).type_as(x),
    )
    cross = _wan_cross(block, encoder_hidden_states)
    return Work([hidden_states], [attention, cross, feed], lambda outs: outs[0], 2 * width)


def _wan_tables(table: Tensor, temb: Tensor) -> Tables:
    if temb.ndim == 4:
        return lambda i, rows: table[:, i] + temb[:, rows, i].float()
    fixed = (table + temb.float()).chunk(6, dim=1)
    return lambda i, rows: fixed[i]


def _wan_modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    modulated: Tensor = norm(x.float()) * (1 + scale) + shift
    return modulated.type_as(x)


def _wan_rope(frequencies: Any) -> Callable[[Tensor, Rows], Tensor] | None:
    """Pairs of channels as complex numbers, rotated; `frequencies`: (cos, sin), [1, tokens, 1, dim] each."""
    if frequencies is None:
        return None
    cos, sin = frequencies[0][..., 0::2], frequencies[1][..., 1::2]

    def rope(x: Tensor, rows: Rows) -> Tensor:
        c, s = cos[:, rows], sin[:, rows]
        real, imaginary = x[..., 0::2], x[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = real * c - imaginary * s
        out[..., 1::2] = real * s + imaginary * c
        return out

    return rope


_WAN_TEXT = 512
"""Tokens of text behind those of the image in an image-to-video context."""


def _wan_cross(block: Any, context: Tensor) -> Stage:
    attn = block.attn2
    split = context.shape[1] - _WAN_TEXT if attn.add_k_proj is not None else 0
    lazy = _Once(lambda: _wan_context(attn, context[:, :split], context[:, split:]))

    def apply(stream: int, hidden: Tensor, rows: Rows) -> Any:
        text, image = lazy()
        query = text.streams[0].query(hidden, rows)
        mixed = text.mixed(query, rows)
        if image is not None:
            mixed = attend(attn, query, *image) + mixed
        return text.streams[0].out(mixed)

    return Stage(
        modules=(attn,),
        enter=lambda _, x, rows: block.norm2(x.float()).type_as(x),
        apply=apply,
        leave=lambda _, x, hidden, y, rows: x + y,
        whole=lambda hiddens: _single(attn(hiddens[0], context, None, None)),
    )


def _wan_context(attn: Any, image: Tensor, text: Tensor) -> tuple[Attention, tuple[Tensor, Tensor] | None]:
    heads = heads_across(attn.heads)
    written = Attention(attn, [Projections.of(attn, heads)], text.shape[1]).given(text)
    if attn.add_k_proj is None:
        return written, None
    key = heads(attn.add_k_proj(image), attn.norm_added_k, slice(0, image.shape[1]))
    return written, (key, attn.add_v_proj(image).unflatten(2, (attn.heads, -1)))


class _Once:
    """Computed at the first call: a module that is called whole never needs its keys."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made


# --- LTX-Video ----------------------------------------------------------------------------------------------------
def ltx(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Work:
    """LTXVideoTransformerBlock. `temb`: [batch, 1 or tokens, 6 * channels]."""
    batch, tokens, width = hidden_states.shape
    adapted = temb.reshape(batch, temb.size(1), 6, -1)

    def table(i: int, rows: Rows) -> Tensor:
        learned: Tensor = block.scale_shift_table[i].to(temb.device)
        return learned + _rows(adapted[:, :, i], rows)

    own = Attention(
        block.attn1,
        [Projections.of(block.attn1, heads_across(block.attn1.heads, _ltx_rope(image_rotary_emb), flat=True))],
        tokens,
    )
    attention = Stage(
        modules=(block.attn1,),
        enter=lambda _, x, rows: block.norm1(x) * (1 + table(1, rows)) + table(0, rows),
        gather=own.gather,
        apply=own,
        leave=lambda _, x, hidden, y, rows: x + y * table(2, rows),
        whole=lambda hiddens: _single(block.attn1(hiddens[0], image_rotary_emb=image_rotary_emb)),
    )
    feed = feed_forward(
        block,
        block.ff,
        lambda x, rows: block.norm2(x) * (1 + table(4, rows)) + table(3, rows),
        lambda _, x, hidden, y, rows: x + y * table(5, rows),
    )
    cross = _text_cross(block.attn2, encoder_hidden_states, encoder_attention_mask, heads_across(block.attn2.heads))
    return Work([hidden_states], [attention, cross, feed], lambda outs: outs[0], 2 * width)


def _ltx_rope(frequencies: Any) -> Callable[[Tensor, Rows], Tensor] | None:
    if frequencies is None:
        return None
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    cos, sin = frequencies
    return lambda x, rows: apply_rotary_emb(x, (cos[:, rows], sin[:, rows]))


def _text_cross(attn: Any, context: Tensor, mask: Tensor | None, heads: Any) -> Stage:
    """Cross-attention without a norm before it."""

    def make() -> Attention:
        keys, batch = context.shape[1], context.shape[0]
        shaped = legacy_mask(attn, mask, keys, batch)
        return Attention(attn, [Projections.of(attn, heads)], keys, shaped).given(context)

    lazy = _Once(make)
    return Stage(
        modules=(attn,),
        enter=lambda _, x, rows: x,
        apply=lambda stream, hidden, rows: lazy()(stream, hidden, rows),
        leave=lambda _, x, hidden, y, rows: x + y,
        whole=lambda hiddens: _single(attn(hiddens[0], encoder_hidden_states=context, attention_mask=mask)),
    )


# --- PixArt -------------------------------------------------------------------------------------------------------
def pixart(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: Any = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Work:
    """BasicTransformerBlock as PixArt configures it: one modulation for all blocks, no norm before cross-attention."""
    batch, tokens, width = hidden_states.shape
    if timestep is None or encoder_hidden_states is None:
        raise ValueError("a block of PixArt needs the timestep's modulation and the text")
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (
        block.scale_shift_table[None] + timestep.reshape(batch, 6, -1)
    ).chunk(6, dim=1)
    own = Attention(
        block.attn1,
        [Projections.of(block.attn1, heads_each(block.attn1.heads))],
        tokens,
        legacy_mask(block.attn1, attention_mask, tokens, batch),
    )
    attention = Stage(
        modules=(block.attn1,),
        enter=lambda _, x, rows: block.norm1(x) * (1 + scale) + shift,
        gather=own.gather,
        apply=own,
        leave=lambda _, x, hidden, y, rows: gate * y + x,
        whole=lambda hiddens: _single(block.attn1(hiddens[0], attention_mask=attention_mask)),
    )
    feed = feed_forward(
        block,
        block.ff,
        lambda x, rows: block.norm2(x) * (1 + ff_scale) + ff_shift,
        lambda _, x, hidden, y, rows: ff_gate * y + x,
    )
    cross = _text_cross(block.attn2, encoder_hidden_states, encoder_attention_mask, heads_each(block.attn2.heads))
    return Work([hidden_states], [attention, cross, feed], lambda outs: outs[0], 2 * width)
