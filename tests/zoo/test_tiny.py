"""The tiny pipelines: reproducible, honest about what they take. What they compute is checked in tests/anatomy."""

from __future__ import annotations

import pytest
import torch

from diffeff.errors import ConfigError, UnknownName
from diffeff.methods.table import TABLE, config_class
from diffeff.zoo.tiny import FAMILIES, SMALL, call_kwargs, make, run, tiny


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = make("sd"), make("sd"), make("sd", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.unet.conv_in.weight, again.unet.conv_in.weight)
    assert not torch.equal(first.unet.conv_in.weight, other.unet.conv_in.weight)
    assert not any(parameter.requires_grad for parameter in first.unet.parameters())
    assert not first.unet.training


def test_size_batch_and_what_is_left_out() -> None:
    pipe = make("wan")
    assert run("wan", pipe, steps=1, size=(2, 4, 6), batch=2).shape == (2, 4, 2, 4, 6)
    assert run("wan", pipe, steps=1, size=(4, 6)).shape == (1, 4, 3, 4, 6)
    assert "output_type" not in call_kwargs("wan", pipe, output_type=...)
    assert "negative_prompt_embeds" not in call_kwargs("wan", pipe, guidance=False)


def test_what_a_pipeline_does_not_take_is_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'sdxl'"):
        make("sdlx")
    with pytest.raises(ConfigError, match="at most 1 rows"):
        call_kwargs("wan-vace", None, batch=2)
    with pytest.raises(ConfigError, match="resizable: False"):
        call_kwargs("dit", None, size=(4, 4))


def test_small_options_are_options_of_methods() -> None:
    for name, options in SMALL.items():
        assert name in TABLE
        config = config_class(name).from_dict(options)
        assert {key: getattr(config, key) for key in options} == dict(options)
    assert {tiny(name) for name in FAMILIES} == set(FAMILIES.values())
