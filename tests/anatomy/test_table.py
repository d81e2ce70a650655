"""The table of families: complete, lazy, true to diffusers, and helpful when a class is not in it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny import make
from torch import nn

from diffeff.anatomy.table import TABLE, denoisers, describe, families
from diffeff.anatomy.types import Streams, deep_segment
from diffeff.errors import ConfigError, MethodInapplicable, UnsupportedModel


def test_every_class_exists_and_stands_in_exactly_one_family() -> None:
    listed = [name for row in families() for name in row.classes.split(", ")]
    assert sorted(listed) == sorted(TABLE)
    for name in TABLE:
        assert issubclass(getattr(diffusers, name), nn.Module)
    assert len({row.family for row in families()}) == len(families())
    assert all(row.title and row.guidance for row in families())


def test_importing_the_table_loads_no_family() -> None:
    code = "import sys, diffeff.anatomy.table; print([m for m in sys.modules if m.startswith('diffeff.anatomy.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for family in ("wan", "flux", "unet2d", "generic"):
        assert f"diffeff.anatomy.{family}'" not in done.stdout
    assert "diffeff.anatomy.table'" in done.stdout


def test_unknown_class_names_the_known_families_and_a_way_out() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(UnsupportedModel) as caught:
        describe(Strange(), "transformer")
    message = str(caught.value)
    assert "Strange" in message
    for row in families():
        assert row.family in message
        assert row.classes in message
    assert "table.py" in message


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no denoiser"):
        denoisers(SimpleNamespace(unet=None, vae=nn.Identity()))


def test_a_missing_second_expert_is_left_out_and_a_shared_one_counted_once() -> None:
    pipe = make("wan-2expert")
    assert [d.name for d in denoisers(pipe)] == ["transformer", "transformer_2"]
    pipe.transformer_2 = pipe.transformer
    assert [d.name for d in denoisers(pipe)] == ["transformer"]
    pipe.transformer = None
    assert [d.name for d in denoisers(pipe)] == ["transformer_2"]


@pytest.mark.parametrize("name", ["wan", "sd"])
def test_compiled_denoisers_are_unwrapped(name: str) -> None:
    pipe = make(name)
    attribute = "unet" if name == "sd" else "transformer"
    plain = getattr(pipe, attribute)
    setattr(pipe, attribute, torch.compile(plain))
    (found,) = denoisers(pipe)
    assert found.module is plain
    assert found.name == attribute
    assert found.signature[0] in ("sample", "hidden_states")


def test_a_subclass_is_described_as_its_parent() -> None:
    model = make("dit").transformer
    model.__class__ = type("MyDiT", (type(model),), {})
    assert describe(model).family == "dit"


def test_describing_touches_nothing() -> None:
    model = make("sdxl").unet
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    describe(model, "unet")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_deep_segment_keeps_the_outer_blocks() -> None:
    (unet,) = denoisers(make("sd"))
    names = [[block.name for block in deep_segment(unet, depth).blocks] for depth in (1, 2, 3)]
    assert names[0] == ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert names[1] == ["down_blocks.2", "mid_block", "up_blocks.0"]
    assert names[2] == ["mid_block"]
    assert not deep_segment(unet, 1).residual
    for depth in (0, 4, -1):
        with pytest.raises(ConfigError, match="1 to 3"):
            deep_segment(unet, depth)


def test_deep_segment_refuses_transformers() -> None:
    with pytest.raises(MethodInapplicable, match="wan"):
        deep_segment(denoisers(make("wan"))[0], 1)


def test_a_unet_without_a_mid_block() -> None:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    found = describe(unet, "unet")
    assert [block.group for block in found.blocks] == ["down", "down", "up", "up"]
    assert [block.name for block in deep_segment(found, 1).blocks] == ["down_blocks.1", "up_blocks.0"]
    with pytest.raises(ConfigError, match="1 to 1"):
        deep_segment(found, 2)


def test_stand_ins_need_a_memo_and_take_no_memory() -> None:
    (unet,) = denoisers(make("sd"))
    down, up = unet.blocks[0].io, unet.blocks[-1].io
    streams = Streams(torch.zeros(1, 16, 8, 8))
    for io in (down, up):
        with pytest.raises(ValueError, match="computed once"):
            io.skipped(streams, None)
    with pytest.raises(ValueError, match="skip connections"):
        down.write(streams)
    result = (torch.rand(2, 4, 8, 8), (torch.rand(2, 4, 16, 16), torch.rand(2, 4, 8, 8)))
    image, skips = down.skipped(streams, down.memo(result))
    assert [t.shape for t in (image, *skips)] == [t.shape for t in (result[0], *result[1])]
    assert all(t.untyped_storage().nbytes() == 4 for t in skips)
    image += 1  # as T2I-Adapters do
    assert not skips[1].any()
