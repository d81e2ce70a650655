"""Transformer blocks of UNets on a slice that is the caller's: residuals go into it, feed-forwards run in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffeff.methods.memory.resnet import add

__all__ = ["Context", "basic_block", "feed_forward", "transformer_rows"]

Parts = Callable[[int, int], list[tuple[int, int]]]
"""Ranges of a number of tokens of so many channels that a feed-forward is to run in."""


@dataclass(frozen=True)
class Context:
    """What the attentions of a block are given beside the feature map, cut to the slice at hand."""

    text: Any = None
    mask: Tensor | None = None
    text_mask: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def take(self, start: int, stop: int, rows: int) -> Context:
        """The part for rows `start` to `stop` of `rows`."""
        if (start, stop) == (0, rows):
            return self
        return Context(*(_take(v, start, stop, rows) for v in (self.text, self.mask, self.text_mask, self.options)))


def _take(value: Any, start: int, stop: int, rows: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _take(v, start, stop, rows) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(v, start, stop, rows) for v in value)
    return value[start:stop] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows else value


def transformer_rows(module: Any, x: Tensor, context: Context, parts: Parts) -> Tensor:
    """One spatial transformer on some rows of a feature map [rows, channels, height, width], written into `x`."""
    if type(module) is not Transformer2DModel or not module.is_input_continuous or _flat(context):
        result: Tensor = module(x, **_transformer_kwargs(context), return_dict=False)[0]
        return result
    n, _, height, width = x.shape
    h = _tokens_in(module, module.norm(x))
    for block in module.transformer_blocks:
        h = basic_block(block, h, context, parts)
    if module.use_linear_projection:
        y = module.proj_out(h).transpose(1, 2).reshape(n, -1, height, width)
    else:
        y = module.proj_out(h.transpose(1, 2).reshape(n, -1, height, width))
    return add(x, y)


def _tokens_in(module: Any, normed: Tensor) -> Tensor:
    """Feature map to tokens [rows, height * width, channels]."""
    if module.use_linear_projection:
        h: Tensor = module.proj_in(normed.flatten(2).transpose(1, 2))
    else:
        h = module.proj_in(normed).flatten(2).transpose(1, 2)
    return h.contiguous()


def _flat(context: Context) -> bool:
    """Masks of two dimensions are turned into biases by the module itself."""
    return any(m is not None and m.ndim == 2 for m in (context.mask, context.text_mask))


def _transformer_kwargs(context: Context) -> dict[str, Any]:
    return {
        "encoder_hidden_states": context.text,
        "cross_attention_kwargs": context.options or None,
        "attention_mask": context.mask,
        "encoder_attention_mask": context.text_mask,
    }


def basic_block(block: Any, h: Tensor, context: Context, parts: Parts) -> Tensor:
    """One transformer block on tokens [sequences, tokens, channels], written into `h`.

    Blocks of other classes (FreeNoise's windows among them) or with other norms run by their own forward.
    """
    if type(block) is not BasicTransformerBlock or block.norm_type != "layer_norm" or "gligen" in context.options:
        return _foreign_block(block, h, context)
    first = context.text if block.only_cross_attention else None
    h = add(h, block.attn1(_normed(block, block.norm1, h), first, context.mask, **context.options))
    if block.attn2 is not None:
        h = add(h, block.attn2(_normed(block, block.norm2, h), context.text, context.text_mask, **context.options))
    return feed_forward(block.ff, block.norm3, h, parts)


def _normed(block: Any, norm: nn.Module, h: Tensor) -> Tensor:
    normed: Tensor = norm(h)
    return normed if block.pos_embed is None else block.pos_embed(normed)


def _foreign_block(block: Any, h: Tensor, context: Context) -> Tensor:
    result: Tensor = block(
        h,
        attention_mask=context.mask,
        encoder_hidden_states=context.text,
        encoder_attention_mask=context.text_mask,
        cross_attention_kwargs=dict(context.options) or None,
    )
    return result


def feed_forward(ff: Any, norm: nn.Module, h: Tensor, parts: Parts, residual: bool = True) -> Tensor:
    """`h + ff(norm(h))` (without `residual`: `ff(norm(h))`) into `h` [sequences, tokens, channels], some tokens at a
    time; exact, as feed-forwards treat every token alone."""
    tokens = h.view(-1, h.shape[-1])
    for start, stop in parts(tokens.shape[0], tokens.shape[1]):
        part = tokens[start:stop]
        out = _hidden(ff, norm(part))
        if residual:
            part.add_(out)
        else:
            part.copy_(out)
    return h


def _hidden(ff: Any, x: Tensor) -> Tensor:
    """One feed-forward; the gated activation of GEGLU in place, which halves its memory."""
    gate = ff.net[0] if type(ff) is FeedForward else None
    if type(gate) is not GEGLU or ff.training or len(ff.net) != 3:
        result: Tensor = ff(x)
        return result
    value, control = gate.proj(x).chunk(2, dim=-1)
    return ff.net[2](value.mul_(torch.ops.aten.gelu_(control)))  # type: ignore[no-any-return]
