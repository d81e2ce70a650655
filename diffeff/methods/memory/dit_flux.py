"""FLUX: two streams with weights of their own, then both as one; with IP-Adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffeff.methods.memory.dit_attention import Attention, Projections, attend, heads_each, rotate
from diffeff.methods.memory.dit_engine import Stage, Work
from diffeff.methods.memory.dit_joint import feed_forwards, modulated, shifts, single

__all__ = ["flux", "flux_single"]

Rows = slice


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x


def flux(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Mapping[str, Any] | None = None,
) -> Work:
    """FluxTransformerBlock: text first. An IP-Adapter's output joins the image behind the feed-forward."""
    attn, given, text = block.attn, dict(joint_attention_kwargs or {}), encoder_hidden_states.shape[1]
    norms = block.norm1_context, block.norm1
    tables = [shifts(norm, 6, temb) for norm in norms]
    own = _FluxAttention(
        attn,
        [
            Projections.added(attn, heads_each(attn.heads, rotate(image_rotary_emb)), 0),
            Projections.of(attn, heads_each(attn.heads, rotate(image_rotary_emb, text)), text),
        ],
        text + hidden_states.shape[1],
    )
    own.adapt(given.get("ip_hidden_states"), hidden_states.shape[0])

    def whole(hiddens: list[Tensor]) -> Sequence[Any]:
        image, words, *adapted = attn(
            hidden_states=hiddens[1], encoder_hidden_states=hiddens[0], image_rotary_emb=image_rotary_emb, **given
        )
        return words, (image, *adapted) if adapted else image

    stages = _flux_stages(block, norms, tables, own, whole)
    width = hidden_states.shape[2]
    return Work(
        [encoder_hidden_states, hidden_states],
        stages,
        lambda outs: (_clipped(outs[0]), outs[1]),
        2 * width,
    )


def _flux_stages(
    block: Any, norms: Any, tables: Sequence[tuple[Tensor, ...]], own: _FluxAttention, whole: Any
) -> list[Stage]:
    later, late = (block.norm2_context, block.norm2), _Late()

    def leave(stream: int, x: Tensor, hidden: Tensor, y: Any, rows: Rows) -> Tensor:
        return x + tables[stream][2] * late.keep(stream, y, rows)

    def leave_feed(stream: int, x: Tensor, hidden: Tensor, y: Tensor, rows: Rows) -> Tensor:
        return late.add(stream, x + tables[stream][5] * y, rows)

    attention = Stage(
        modules=(block.attn,),
        enter=lambda s, x, rows: modulated(norms[s].norm, x, tables[s][1], tables[s][0]),
        apply=own,
        leave=leave,
        whole=whole,
        gather=own.gather,
    )
    feed = feed_forwards(
        [block.ff_context, block.ff],
        lambda s, x, rows: modulated(later[s], x, tables[s][4], tables[s][3]),
        leave_feed,
    )
    return [attention, feed]


class _Late:
    """An IP-Adapter's share of the image stream, kept per slice until the feed-forward is through."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def keep(self, stream: int, y: Any, rows: Rows) -> Tensor:
        if isinstance(y, tuple):
            self._kept[rows.start], y = y[1], y[0]
        kept: Tensor = y
        return kept

    def add(self, stream: int, x: Tensor, rows: Rows) -> Tensor:
        late = self._kept.pop(rows.start, None) if stream == 1 else None
        return x if late is None else x + late


class _FluxAttention(Attention):
    """Joint attention, and what the image's queries, before rotation, find in an IP-Adapter's image tokens."""

    def adapt(self, images: Sequence[Tensor] | None, batch: int) -> None:
        """Keys and values of each adapter. `images`: [batch, tokens, channels] each."""
        processor, heads = self.attn.processor, self.attn.heads
        self.adapters: list[tuple[float, Tensor, Tensor]] = []
        if not hasattr(processor, "to_k_ip") or images is None:
            return
        layers = zip(images, processor.scale, processor.to_k_ip, processor.to_v_ip, strict=False)
        for image, scale, to_k, to_v in layers:
            k, v = (layer(image).reshape(batch, -1, heads, self.attn.head_dim) for layer in (to_k, to_v))
            self.adapters.append((scale, k, v))

    def __call__(self, stream: int, hidden: Tensor, rows: Rows) -> Any:
        y = super().__call__(stream, hidden, rows)
        if stream == 0 or not self.adapters:
            return y
        plain = heads_each(self.attn.heads)(self.attn.to_q(hidden), self.attn.norm_q, rows)
        parts = [scale * attend(self.attn, plain, k, v) for scale, k, v in self.adapters]
        return y, torch.stack(parts).sum(0)


def flux_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Mapping[str, Any] | None = None,
) -> Work:
    """FluxSingleTransformerBlock: text first."""
    attn, text = block.attn, encoder_hidden_states.shape[1]
    tables = shifts(block.norm, 3, temb)
    own = Attention(
        attn,
        [
            Projections.of(attn, heads_each(attn.heads, rotate(image_rotary_emb))),
            Projections.of(attn, heads_each(attn.heads, rotate(image_rotary_emb, text)), text),
        ],
        text + hidden_states.shape[1],
    )

    def whole(hiddens: list[Tensor]) -> Sequence[Tensor]:
        given = dict(joint_attention_kwargs or {})
        joined = attn(hidden_states=torch.cat(hiddens, dim=1), image_rotary_emb=image_rotary_emb, **given)
        return joined[:, :text], joined[:, text:]

    streams = [encoder_hidden_states, hidden_states]
    return single(block, streams, own, lambda i, s, rows: tables[i], whole, tuple, _clipped)
