"""The words of the world for CLIP: a tokenizer built the same way every time, and a small text encoder."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from diffeff.zoo.world import ATTRIBUTES

MAX_TOKENS = 16
WIDTH = 64
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."


def vocabulary() -> list[str]:
    """Every word of the captions, sorted."""
    phrases = [word for words in ATTRIBUTES.values() for word in words]
    return sorted({word for phrase in [*phrases, "a camera"] for word in re.findall(r"\w+", phrase)})


def byte_pairs(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Byte-pair merges that turn each of `words` into one token, and the tokens they make.

    Ties between equally frequent pairs are broken by spelling, so that ids never change between runs.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(piece, best) for piece in pieces]
    return merges, ["".join(pair) for pair in merges]


def _merged(piece: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in piece:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def build_tokenizer() -> Any:
    """A `CLIPTokenizer` with one token for each word of the captions; other text falls back to letters."""
    from transformers import CLIPTokenizer

    merges, made = byte_pairs(vocabulary())
    tokens = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), *made, _START, _END]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    build: Any = CLIPTokenizer  # annotated for merges as text, which it splits into the pairs given here
    return build(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: Any) -> Any:
    """A `CLIPTextModel` of two layers of width 64, about 0.1 M parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """Ids [N, MAX_TOKENS], padded as Stable Diffusion's pipelines pad."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids.to(torch.long)
