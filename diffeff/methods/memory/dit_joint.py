"""Blocks whose attention mixes image and text tokens of two streams: CogVideoX, HunyuanVideo, FLUX, SD3.

Streams keep the order of the joint sequence, so that a stream's keys start where the streams before it end. Blocks
that join both streams in one tensor (single blocks) are run as two streams with the same weights: nothing is joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.methods.memory.dit_attention import Attention, Projections, heads_each, rotate
from diffeff.methods.memory.dit_engine import Stage, Work

__all__ = ["cogvideox", "feed_forwards", "modulated", "shifts", "single"]

Rows = slice
Enter = Callable[[int, Tensor, Rows], Tensor]
Leave = Callable[[int, Tensor, Tensor, Any, Rows], Tensor]


def modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift; `scale`, `shift`: [batch, channels] or [batch, 1 or tokens, channels]."""
    scale, shift = (t[:, None] if t.ndim == 2 else t for t in (scale, shift))
    normed: Tensor = norm(x)
    return normed * (1 + scale) + shift


def shifts(norm: Any, count: int, temb: Tensor) -> tuple[Tensor, ...]:
    """What an adaptive norm makes of the conditioning: shift, scale, gate of the attention, those of the feed-forward,
    and so on, [batch, 1, channels] each."""
    return tuple(t[:, None] for t in norm.linear(norm.silu(temb)).chunk(count, dim=1))


def feed_forwards(layers: Sequence[Any], enter: Enter, leave: Leave) -> Stage:
    """One feed-forward per stream; None for a stream that ends before. The same module for all is called on all of
    them joined, as the block itself does."""
    present = tuple(layer for layer in layers if layer is not None)

    def whole(hiddens: list[Tensor]) -> Sequence[Any]:
        if len(present) > 1 and len(set(map(id, present))) == 1:
            joined = present[0](torch.cat(hiddens, dim=1))
            return joined.split([h.shape[1] for h in hiddens], dim=1)  # type: ignore[no-any-return]
        return [h if layer is None else layer(h) for layer, h in zip(layers, hiddens, strict=True)]

    return Stage(
        modules=present,
        enter=lambda stream, x, rows: x if layers[stream] is None else enter(stream, x, rows),
        apply=lambda stream, hidden, rows: layers[stream](hidden),
        leave=leave,
        whole=whole,
    )


# --- CogVideoX ----------------------------------------------------------------------------------------------------
def cogvideox(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: Any = None,
) -> Work:
    """CogVideoXBlock: text first, one set of projections and one feed-forward for both streams."""
    attn, text = block.attn1, encoder_hidden_states.shape[1]
    tables = [_cog_tables(norm, temb) for norm in (block.norm1, block.norm2)]

    def enter(number: int, norm: nn.Module) -> Enter:
        return lambda stream, x, rows: modulated(norm, x, tables[number][stream][1], tables[number][stream][0])

    def leave(number: int) -> Leave:
        return lambda stream, x, hidden, y, rows: x + tables[number][stream][2][:, None] * y

    own = Attention(
        attn,
        [
            Projections.of(attn, heads_each(attn.heads)),
            Projections.of(attn, heads_each(attn.heads, rotate(image_rotary_emb)), text),
        ],
        text + hidden_states.shape[1],
    )

    def whole(hiddens: list[Tensor]) -> Sequence[Tensor]:
        image, words = attn(
            hidden_states=hiddens[1],
            encoder_hidden_states=hiddens[0],
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        return words, image

    attention = Stage((attn,), enter(0, block.norm1.norm), own, leave(0), whole, own.gather)
    feed = feed_forwards([block.ff] * 2, enter(1, block.norm2.norm), leave(1))
    width = hidden_states.shape[2]
    return Work(
        [encoder_hidden_states, hidden_states],
        [attention, feed],
        lambda outs: (outs[1], outs[0]),
        2 * width,
    )


def _cog_tables(norm: Any, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(shift, scale, gate) of the text and of the image, [batch, channels] each."""
    tables = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    return tables[3:], tables[:3]


# --- blocks with one set of weights for both streams -----------------------------------------------------------------
def single(
    block: Any,
    streams: list[Tensor],
    attention: Attention,
    tables: Callable[[int, int, Rows], Tensor],
    whole: Callable[[list[Tensor]], Sequence[Any]],
    pack: Callable[[list[Tensor]], Any],
    settle: Callable[[Tensor], Tensor] = lambda x: x,
) -> Work:
    """A block whose attention and feed-forward run side by side on one norm: x + gate * proj_out([attn, mlp]).

    `tables(i, stream, rows)`: shift, scale, gate for i = 0, 1, 2. `settle`: applied to what is put out.
    """

    def leave(stream: int, x: Tensor, hidden: Tensor, y: Any, rows: Rows) -> Tensor:
        joined = torch.cat([y, block.act_mlp(block.proj_mlp(hidden))], dim=2)
        return settle(x + tables(2, stream, rows) * block.proj_out(joined))

    stage = Stage(
        modules=(block.attn,),
        enter=lambda s, x, rows: modulated(block.norm.norm, x, tables(1, s, rows), tables(0, s, rows)),
        apply=attention,
        leave=leave,
        whole=whole,
        gather=attention.gather,
    )
    width = streams[0].shape[2]
    return Work(streams, [stage], pack, 2 * width)
