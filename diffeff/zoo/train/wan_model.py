"""The text encoder and transformer of `sprites-wan`, and a training-time forward pass that compiles."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import diffusers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from diffeff.zoo.train.wan_codec import CHANNELS
from diffeff.zoo.world import SCENES

# Lazy modules and the attributes of a torch module are opaque to type checkers.
_diffusers: Any = diffusers
_transformers: Any = transformers
Block: TypeAlias = Any  # WanTransformerBlock or WanAttention
Transformer: TypeAlias = Any  # diffusers.WanTransformer3DModel
TextEncoder: TypeAlias = Any  # transformers.UMT5EncoderModel
WordTokenizer: TypeAlias = Any  # transformers.PreTrainedTokenizerFast

TEXT_WIDTH, WIDTH, LAYERS = 64, 192, 8


def build_tokenizer() -> WordTokenizer:
    """One token per word; the vocabulary is the words of the world. Unknown words map to ``<unk>``."""
    words = sorted({w for s in SCENES for w in re.findall(r"\w+", s.caption)} | {","})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return _transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary: int) -> TextEncoder:
    """A two-layer UMT5 encoder, 64 wide."""
    return _transformers.UMT5EncoderModel(
        _transformers.UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer() -> Transformer:
    """Eight Wan blocks, 192 wide, over 80 tokens of 1x2x2 latent cells."""
    model = _diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * WIDTH,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.bias)
        model.scale_shift_table.zero_()
        for block in model.blocks:
            # Every branch starts silent but open: gates 1, output projections 0.
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, (2, 5)] = 1.0
            for projection in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                nn.init.zeros_(projection.weight)
    return model


class Joint(nn.Module):
    """Text encoder and transformer with a forward pass made for training: the same function as
    `WanTransformer3DModel.forward`, with the padding folded into one key and blocks that compile."""

    def __init__(self, text_encoder: TextEncoder, transformer: Transformer) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.block_forward: Callable[..., Tensor] = block_forward

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        """Predict noise - data [B, C, T, H, W]; `tokens` [B, L] ids, `padding` [B] zero tokens to pretend."""
        text, bias = self._text(tokens, padding)
        model = self.transformer
        cos, sin = model.rope(noisy)
        x = model.patch_embedding(noisy)
        _, _, t, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        temb, modulation, text, _ = model.condition_embedder(1000.0 * sigma, text)
        modulation = modulation.unflatten(1, (6, -1))
        cos, sin = cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()
        for block in model.blocks:
            x = self.block_forward(block, x, text, modulation, cos, sin, bias)
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        x = model.proj_out(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.view(len(x), t, h, w, 1, 2, 2, CHANNELS).permute(0, 7, 1, 4, 2, 5, 3, 6)
        velocity: Tensor = x.reshape(noisy.shape)
        return velocity

    def _text(self, tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Text states [B, L + 1, D] and additive key bias [B, 1, 1, L + 1].

        WanPipeline pads the text with zero vectors to `max_sequence_length` and attends to them unmasked.
        One zero key with bias log(n) is the same as n of them, at the cost of one; drawing n at random makes
        the model work for every `max_sequence_length`.
        """
        shown = tokens != 0
        states = self.text_encoder(input_ids=tokens, attention_mask=shown.long()).last_hidden_state
        states = F.pad(states * shown.unsqueeze(-1), (0, 0, 0, 1))
        hidden = torch.zeros_like(states[..., 0]).masked_fill_(F.pad(~shown, (0, 1)), -1e4)
        hidden[:, -1] = padding.log()
        return states, hidden[:, None, None, :]


def block_forward(
    block: Block, x: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, bias: Tensor
) -> Tensor:
    """One Wan block: modulated self-attention with rotary positions, cross-attention, feed-forward."""
    tables = (block.scale_shift_table + modulation).chunk(6, dim=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = tables
    width = x.shape[-1:]
    y = F.layer_norm(x, width, eps=1e-6) * (1 + scale1) + shift1
    x = x + _attention(block.attn1, y, y, None, cos, sin) * gate1
    y = F.layer_norm(x, width, block.norm2.weight, block.norm2.bias, eps=1e-6)
    x = x + _attention(block.attn2, y, text, bias, None, None)
    y = F.layer_norm(x, width, eps=1e-6) * (1 + scale2) + shift2
    y = F.gelu(block.ffn.net[0].proj(y), approximate="tanh")
    out: Tensor = x + block.ffn.net[2](y) * gate2
    return out


def _attention(
    attn: Block, x: Tensor, source: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
    q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    # The CPU's bfloat16 attention has a backward pass seven times slower than its float32 one.
    kind = torch.float32 if x.device.type == "cpu" else v.dtype
    q, k, v = (part.transpose(1, 2).to(kind) for part in (q, k, v))
    with torch.autocast(x.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(kind))
    out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def tokenise(tokenizer: WordTokenizer, captions: list[str], device: torch.device) -> Tensor:
    """Ids [B, 10]; ten tokens hold every caption of the world."""
    batch = tokenizer(captions, padding="max_length", max_length=10, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids.to(device)
    return ids
