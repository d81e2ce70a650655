"""Stable Diffusion 3 and 3.5: joint attention, a second one over the image alone, IP-Adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffeff.methods.memory.dit_attention import Attention, Projections, attend, heads_each
from diffeff.methods.memory.dit_engine import Stage, Work
from diffeff.methods.memory.dit_joint import feed_forwards, modulated, shifts

__all__ = ["sd3"]

Rows = slice


def sd3(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: Mapping[str, Any] | None = None,
) -> Work:
    """JointTransformerBlock: image, then text; a second attention over the image in some blocks of SD3.5 medium. The
    last block reads the text and does not put it out."""
    last, dual = bool(block.context_pre_only), bool(block.use_dual_attention)
    image = shifts(block.norm1, 9 if dual else 6, temb)
    text = _last_shifts(block.norm1_context, temb) if last else shifts(block.norm1_context, 6, temb)
    tables, norms = (image, text), (block.norm1.norm, block.norm1_context.norm)
    joint = _Attentions(block, hidden_states, encoder_hidden_states, dict(joint_attention_kwargs or {}))

    def enter(stream: int, x: Tensor, rows: Rows) -> Tensor:
        hidden = modulated(norms[stream], x, tables[stream][1], tables[stream][0])
        if stream or not dual:
            return hidden
        return torch.stack([hidden, modulated(norms[0], x, image[7], image[6])], dim=2)

    def leave(stream: int, x: Tensor, hidden: Tensor, y: Any, rows: Rows) -> Tensor:
        if isinstance(y, tuple):
            first, second = y
            x, y = x + image[8] * second, first
        return x.addcmul(tables[stream][2], y)

    later = (block.norm2, block.norm2_context)
    modules = (block.attn, block.attn2) if dual else (block.attn,)
    feed = feed_forwards(
        [block.ff, block.ff_context],
        lambda s, x, rows: modulated(later[s], x, tables[s][4], tables[s][3]),
        lambda s, x, hidden, y, rows: x + tables[s][5] * y,
    )
    width = hidden_states.shape[2]
    return Work(
        [hidden_states, encoder_hidden_states],
        [Stage(modules, enter, joint, leave, joint.whole, joint.gather), feed],
        lambda outs: (None if last else outs[1], outs[0]),
        (4 if dual else 2) * width,
        frozenset({1}) if last else frozenset(),
    )


def _last_shifts(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    scale, shift = shifts(norm, 2, temb)
    return shift, scale


class _Attentions:
    """The joint attention and, in a block with two, that over the image; `hidden` is then [batch, tokens, 2, width]."""

    def __init__(self, block: Any, image: Tensor, text: Tensor, given: dict[str, Any]) -> None:
        self.given, tokens = given, (image.shape[1], text.shape[1])
        self.joint = _Adapted(block.attn, tokens, given)
        self.second = _Adapted(block.attn2, (tokens[0], 0), given) if block.use_dual_attention else None

    def _parts(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return (hidden, None) if hidden.ndim == 3 else (hidden[:, :, 0], hidden[:, :, 1])

    def gather(self, stream: int, hidden: Tensor, rows: Rows) -> None:
        first, second = self._parts(hidden)
        self.joint.gather(stream, first, rows)
        if self.second is not None and second is not None:
            self.second.gather(stream, second, rows)

    def __call__(self, stream: int, hidden: Tensor, rows: Rows) -> Any:
        first, second = self._parts(hidden)
        y = self.joint(stream, first, rows)
        if self.second is None or second is None:
            return y
        return y, self.second(stream, second, rows)

    def whole(self, hiddens: list[Tensor]) -> Sequence[Any]:
        first, second = self._parts(hiddens[0])
        image, text = self.joint.attn(hidden_states=first, encoder_hidden_states=hiddens[1], **self.given)
        if self.second is None or second is None:
            return image, text
        return (image, self.second.attn(hidden_states=second, **self.given)), text


class _Adapted(Attention):
    """One attention with or without an IP-Adapter, whose queries look at the image tokens and its own.

    Values lie as [text, image, adapter]: both attentions read them in place, each its own stretch.
    """

    def __init__(self, attn: Any, tokens: tuple[int, int], given: Mapping[str, Any]) -> None:
        image, self.text = tokens
        heads = heads_each(attn.heads)
        streams = [Projections.of(attn, heads, self.text)]
        if self.text:
            streams.append(Projections.added(attn, heads, 0))
        processor, context = attn.processor, given.get("ip_hidden_states")
        self.adapter = processor if context is not None and getattr(processor, "scale", 0) != 0 else None
        self.own: tuple[Tensor, Tensor] | None = None
        extra = 0
        if self.adapter is not None and context is not None:
            normed = processor.norm_ip(context, temb=given.get("temb"))
            key = processor.norm_ip_k(processor.to_k_ip(normed).unflatten(2, (attn.heads, -1)))
            self.own = key, processor.to_v_ip(normed).unflatten(2, (attn.heads, -1))
            extra = key.shape[1]
        super().__init__(attn, streams, self.text + image)
        self.image, self.extra = image, extra
        self.image_k: Tensor | None = None
        self.all_v: Tensor | None = None

    def gather(self, stream: int, hidden: Tensor, rows: Rows) -> None:
        """Keep the keys and values of these rows, those for the adapter's attention beside them."""
        if self.own is not None and self.all_v is None:
            self._make_room(*self.own)
        super().gather(stream, hidden, rows)
        if stream == 0 and self.adapter is not None and self.image_k is not None:
            raw = self.attn.to_k(hidden).unflatten(2, (self.attn.heads, -1))
            self.image_k[:, rows] = self.adapter.norm_k(raw)

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        batch, _, heads, dim = key.shape
        self.k = key.new_empty((batch, self.keys, heads, dim))
        self.image_k = key.new_empty((batch, self.image + self.extra, heads, dim))
        self.all_v = value.new_empty((batch, self.keys + self.extra, heads, dim))
        self.v = self.all_v[:, : self.keys]
        self.image_k[:, self.image :] = key
        self.all_v[:, self.keys :] = value

    def __call__(self, stream: int, hidden: Tensor, rows: Rows) -> Tensor:
        if stream or self.adapter is None or self.image_k is None or self.all_v is None:
            return super().__call__(stream, hidden, rows)
        own = self.streams[0]
        raw = self.attn.to_q(hidden).unflatten(2, (self.attn.heads, -1))
        query = raw if own.norm_q is None else own.norm_q(raw)
        mixed = self.mixed(query, rows)
        adapted = attend(self.attn, self.adapter.norm_q(raw), self.image_k, self.all_v[:, self.text :])
        return own.out(mixed + adapted * self.adapter.scale)
