"""Anatomies guessed from diffusers' metadata: right where they are given, refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers as d
import pytest
import torch
from tiny import make
from torch import nn
from watch import watching

from diffeff.anatomy import generic
from diffeff.anatomy.table import denoisers, describe
from diffeff.anatomy.types import CFG
from diffeff.errors import UnsupportedModel


def _text(width: int = 16) -> torch.Tensor:
    return torch.randn(2, 7, width)


def _mochi() -> tuple[nn.Module, dict[str, Any]]:
    model = d.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=7,
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": mask,
    }


def _qwenimage() -> tuple[nn.Module, dict[str, Any]]:
    model = d.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": torch.randn(2, 24, 16),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.long),
        "img_shapes": [[(1, 4, 6)]] * 2,
    }


def _lumina2() -> tuple[nn.Module, dict[str, Any]]:
    model = d.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
    }


# Mochi asks for an autocast to float32, which torch warns about on CPUs.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

GUESSED: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "mochi": _mochi,
    "qwenimage": _qwenimage,
    "lumina2": _lumina2,
}


@pytest.fixture(params=GUESSED)
def guessed(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, kwargs = GUESSED[request.param]()
    return model.eval().requires_grad_(False), {**kwargs, "return_dict": False}


def test_a_guess_is_marked_and_says_what_it_used(guessed: tuple[nn.Module, dict[str, Any]]) -> None:
    found = describe(guessed[0])
    assert found.generic
    assert found.cfg is CFG.UNKNOWN
    assert found.family == type(guessed[0]).__name__
    assert "Guessed" in found.notes[0]
    assert not describe(make("dit").transformer).generic


def test_a_guess_agrees_with_the_run(guessed: tuple[nn.Module, dict[str, Any]]) -> None:
    model, kwargs = guessed
    found = describe(model)
    sites = {site.name: site for site in found.attentions}
    blocks = [(block.name, block.module) for block in found.blocks]
    with watching(model, blocks, [(s.name, s.module) for s in found.attentions]) as watch:
        model(**kwargs)
    (call,) = watch.calls
    assert [block.name for block in call.blocks] == [block.name for block in found.blocks]
    assert len(call.blocks) == 3
    assert set(found.rows) >= {"hidden_states", "encoder_hidden_states", "timestep"}
    for site, block in zip(found.blocks, call.blocks, strict=True):
        before, after = site.io.read(block.args, block.kwargs), site.io.outputs(block.result)
        assert before.image.shape == after.image.shape
        written = site.io.write(after, block.result)
        pairs = (
            [(written, block.result)] if isinstance(written, torch.Tensor) else zip(written, block.result, strict=True)
        )
        assert all(a is b for a, b in pairs)
        for kernel in block.kernels:
            heads, width = sites[kernel.inside].heads, sites[kernel.inside].head_dim
            assert (kernel.q.shape[1], kernel.q.shape[3]) == (heads, width)
    for (site, one), (_, two) in pairwise(zip(found.blocks, call.blocks, strict=True)):
        assert site.io.read(two.args, two.kwargs).image is site.io.outputs(one.result).image


def test_a_guessed_segment_can_be_skipped(guessed: tuple[nn.Module, dict[str, Any]]) -> None:
    model, kwargs = guessed
    found = describe(model)
    last = found.blocks[-1]
    with watching(model, [(last.name, last.module)]) as watch:
        expected = model(**kwargs)[0]
    true = last.io.outputs(watch.calls[0].blocks[0].result)
    with pytest.MonkeyPatch.context() as patch:
        for block in found.segment(1).blocks:
            streams = true if block is last else None
            patch.setattr(block.module, "forward", _skipping(block.io, streams))
        assert torch.equal(model(**kwargs)[0], expected)


def _skipping(io: Any, last: Any) -> Callable[..., Any]:
    return lambda *a, **k: io.skipped(io.read(a, k), None) if last is None else io.write(last)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx", "hunyuanvideo", "flux", "sd3", "pixart", "dit"])
def test_guesses_agree_with_the_families_written_by_hand(name: str) -> None:
    """diffusers' own metadata is a second opinion on the order of streams."""
    (written,) = denoisers(make(name))
    guess, reason = generic.guess(written.module, "transformer")
    assert guess is not None, reason
    assert [b.name for b in guess.blocks] == [b.name for b in written.blocks]
    for a, b in zip(guess.blocks, written.blocks, strict=True):
        assert (a.io.image, a.io.image_at, a.io.text) == (b.io.image, b.io.image_at, b.io.text)
        assert a.io.text is None or a.io.text_at == b.io.text_at
    assert [s.name for s in guess.attentions] == [s.name for s in written.attentions]


def test_refiners_are_no_part_of_the_stack() -> None:
    found = describe(_lumina2()[0])
    assert {block.group for block in found.blocks} == {"layers"}
    assert "noise_refiner" in found.notes[0]
    assert "context_refiner" in found.notes[0]


def test_alternating_stacks_are_refused() -> None:
    model = d.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
    )
    with pytest.raises(UnsupportedModel, match="in turn"):
        describe(model)


def test_blocks_of_unknown_output_are_refused() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor):  # no annotation: that is the point
            return hidden_states

    class Model(nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return hidden_states

    with pytest.raises(UnsupportedModel, match="no metadata"):
        describe(Model())
    Block.forward.__annotations__["return"] = torch.Tensor
    assert len(describe(Model()).blocks) == 2


def test_without_diffusers_private_registry_only_annotated_blocks_are_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers.hooks._helpers", None)
    with pytest.raises(UnsupportedModel, match="no metadata"):
        describe(_qwenimage()[0])
    assert describe(_lumina2()[0]).generic
