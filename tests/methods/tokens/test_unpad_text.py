"""UnpadText: exactness of both cuts, whom it refuses, what it notices, the text encoder, the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make, run
from torch import Tensor

from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.tokens.unpad_text import UnpadText, cut_alike, cut_masked
from diffeff.pipeline import DiffEffPipeline
from diffeff.zoo import bundled

FEW = UnpadText(multiple=1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def padded(lengths: list[int], total: int = 12) -> Tensor:
    """Texts of these lengths with the same token behind each."""
    text = torch.randn(len(lengths), total, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, length in enumerate(lengths):
        text[row, length:] = text[0, 0] * 0.5
    return text


@pytest.mark.parametrize("lengths", [[5], [5, 2], [1, 9, 4], [0, 3]])
@pytest.mark.parametrize("multiple", [1, 4])
def test_one_key_with_a_bias_stands_for_all_equal_ones(lengths: list[int], multiple: int) -> None:
    text = padded(lengths)
    cut = cut_alike(text, multiple)
    if cut is None:
        assert max(lengths) + 1 > 12 - multiple
        return
    assert cut.bias is not None
    assert cut.text.shape[1] == -(-(max(lengths) + 1) // multiple) * multiple
    query = torch.randn(len(lengths), 1, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = F.scaled_dot_product_attention(query, text[:, None], text[:, None])
    short = cut.text[:, None]
    assert relative(F.scaled_dot_product_attention(query, short, short, attn_mask=cut.bias), whole) < 1e-7
    assert relative(F.scaled_dot_product_attention(query, short, short), whole) > 1e-3


def test_a_text_without_padding_stays() -> None:
    assert cut_alike(torch.randn(2, 7, 3), 1) is None
    assert cut_alike(padded([11]), 1) is None, "one token of padding cannot be cut to less than one"
    assert cut_alike(padded([6]), 16) is None


def test_masked_tokens_go_down_to_the_longest_row() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0]])
    cut = cut_masked(torch.randn(2, 8, 3), mask, 1)
    assert cut is not None
    assert cut.mask is not None
    assert cut.text.shape == (2, 3, 3)
    assert cut.mask.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert cut_masked(torch.randn(2, 8, 3), torch.zeros(2, 8), 1) is None
    assert cut_masked(torch.randn(1, 8, 3), torch.ones(1, 8), 1) is None


@pytest.mark.parametrize("family", ["wan", "wan-2expert", "ltx", "pixart"])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_to_rounding_on_real_classes(family: str, batch: int) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=3, batch=batch)
    found = run(family, pipe.apply([FEW]), steps=3, batch=batch)
    assert relative(found, plain) < 1e-5
    assert pipe.report is not None
    assert pipe.report.methods[0].details["tokens_kept"] < pipe.report.methods[0].details["tokens_before"]
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=3, batch=batch), plain)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("flux", "differs from token"),
        ("sd", "differs from token"),
        ("wan-vace", "differs"),
        ("wan-i2v", "fixed places"),
    ],
)
def test_refused_where_padding_is_part_of_the_text(family: str, reason: str) -> None:
    pipe = DiffEffPipeline(make(family))
    with pytest.raises(MethodInapplicable, match=reason):
        pipe.apply([FEW])


def test_an_attention_that_cannot_be_told_of_the_padding_is_noticed() -> None:
    pipe = DiffEffPipeline(make("wan"))
    module = pipe.denoisers[0].blocks[1].attentions[1].module
    module.processor = Softmax()
    with pytest.raises(ConfigError, match="3 of 4 cross-attentions"):
        run("wan", pipe.apply([FEW]), steps=2)


class Softmax:
    """A processor that never calls scaled_dot_product_attention."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out: Tensor = attn.to_out[0]((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return out


def test_the_text_encoder_works_on_the_prompt_alone() -> None:
    wrapped = bundled.load("sprites-wan")
    seen: list[int] = []
    wrapped.text_encoder.encoder.block[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    pipe = DiffEffPipeline(wrapped)
    prompts = ["a red circle moving left", "a large blue square over stripes, the camera pans to the right"]

    def encode() -> Tensor:
        with torch.no_grad():
            embeds: Tensor = pipe.wrapped.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
        return embeds

    plain = encode()
    pipe.apply([UnpadText()])
    found = encode()
    assert seen[0] == plain.shape[1]
    assert seen[1] < 40
    assert seen[1] % 8 == 0
    assert found.shape == plain.shape
    assert relative(found, plain) < 1e-5
    pipe.apply([UnpadText(encoder=False)])
    assert torch.equal(encode(), plain)
    pipe.remove()
    assert "forward" not in pipe.wrapped.text_encoder.__dict__
    assert torch.equal(encode(), plain)


def test_other_uses_of_the_text_encoder_are_left_alone() -> None:
    pipe = DiffEffPipeline(bundled.load("sprites-wan")).apply([UnpadText()])
    encoder = pipe.wrapped.text_encoder
    ids = torch.tensor([[5, 6, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        unmasked = encoder(ids).last_hidden_state
        layers = encoder(ids, mask, output_hidden_states=True).hidden_states
        short = encoder(ids, attention_mask=mask).last_hidden_state
    assert (unmasked[:, 3:] != 0).any()
    assert layers[0].shape[1] == 12
    assert (short[:, 8:] == 0).all()
    assert (short[:, :3] != 0).any()
