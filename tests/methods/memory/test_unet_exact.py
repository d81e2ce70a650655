"""Sliced UNets give what unsliced ones give: every family, number of slices, size, and whatever else is plugged in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make
from torch import Tensor, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.norm import group_affine
from diffeff.methods.memory.unet import slice_unet
from diffeff.zoo.tiny import WIDTH

FAMILIES = ("sd", "sdxl", "animatediff", "animatediff-sdxl", "svd")
CLOSE = 1e-5
"""Relative error in float32."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def unet(family: str) -> Any:
    return make(family).unet


def inputs(family: str, batch: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Arguments of one call of the denoiser; images have `batch * frames` rows."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "svd":
        text, times = noise(batch, 1, WIDTH), noise(batch, 3)
        sample = noise(batch, frames, unet(family).config.in_channels, *size)
        return {"sample": sample, "timestep": 500, "encoder_hidden_states": text, "added_time_ids": times}
    video = family.startswith("animatediff")
    rows = batch if video else batch * frames
    sample = noise(batch, 4, frames, *size) if video else noise(rows, 4, *size)
    call = {"sample": sample, "timestep": 500, "encoder_hidden_states": noise(batch * frames, 7, WIDTH)}
    if "sdxl" in family:
        call["added_cond_kwargs"] = {"text_embeds": noise(rows, WIDTH), "time_ids": noise(rows, 6)}
    return call


def error(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def sliced(model: Any, call: dict[str, Any], slices: int | None) -> Tensor:
    undo = slice_unet(model, Share(None, slices))
    try:
        result: Tensor = model(**call, return_dict=False)[0]
    finally:
        undo()
    return result


def check(model: Any, call: dict[str, Any], slices: int | None = 3) -> None:
    plain = model(**call, return_dict=False)[0]
    assert error(sliced(model, call, slices), plain) < CLOSE
    assert torch.equal(model(**call, return_dict=False)[0], plain)


SHAPES = [(2, 4, (8, 8)), (1, 1, (8, 8)), (1, 5, (9, 7))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_slices(family: str, shape: tuple[int, int, tuple[int, int]]) -> None:
    model, call = unet(family), inputs(family, *shape)
    plain = model(**call, return_dict=False)[0]
    for slices in (None, 1, 2, 3, 5, 1000):
        out = sliced(model, call, slices)
        assert type(out) is Tensor
        assert error(out, plain) < CLOSE, slices
    assert torch.equal(model(**call, return_dict=False)[0], plain)


def ramp(x: Tensor) -> Tensor:
    """The same features with a strong slope from left to right: every strip has other statistics."""
    return x + torch.linspace(-8, 8, x.shape[-1])


def published(module: nn.Module, x: Tensor, frames: int, slices: int) -> Tensor:
    """The published form: the whole motion module, its group norm included, on one strip of the width at a time."""
    return torch.cat([module(strip, num_frames=frames) for strip in x.chunk(slices, -1)], -1)


def test_a_ramp_breaks_the_published_form_and_not_ours() -> None:
    from diffeff.methods.memory.temporal import motion_module
    from diffeff.methods.memory.unet_cuts import slices_for

    model = unet("animatediff")
    module = model.down_blocks[0].motion_modules[0]
    x = ramp(torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    plain = module(x, num_frames=4)
    branch = (plain - x).norm()
    assert float((published(module, x, 4, 4) - plain).norm() / branch) > 0.1
    ours = x.clone()
    motion_module(module, ours, 4, slices_for(model, torch.zeros(2, 4, 4, 8, 8), Share(None, 4)))
    assert float((ours - plain).norm() / branch) < CLOSE


@pytest.mark.parametrize("family", ["animatediff", "svd"])
def test_a_ramp_through_the_whole_model(family: str) -> None:
    call = inputs(family)
    check(unet(family), call | {"sample": ramp(call["sample"])})


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_group_statistics_of_parts_are_those_of_the_whole(offset: float) -> None:
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2 * 5, 8, 6, 7, generator=torch.Generator().manual_seed(0)) * 3 + offset
    whole = norm.double()(x.double().view(2, 5, 8, 42).transpose(1, 2)).transpose(1, 2)
    affine = group_affine(x, norm.float(), 2, [(0, 3), (3, 10)])
    parts = torch.stack([affine.apply(x.view(2, 5, 8, 42)[item], item) for item in range(2)])
    assert error(parts.double(), whole) < (1e-6 if offset == 0 else 1e-3)


# --- what else is plugged in --------------------------------------------------------------------------------------
def residuals(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Random ControlNet residuals of the right shapes, as SparseCtrl gives them too."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda m, a, out: seen.extend(out[1])) for block in model.down_blocks]
    hooks.append(model.conv_in.register_forward_hook(lambda m, a, out: seen.insert(0, out)))
    model(**call)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(1)
    down = tuple(torch.randn(s.shape, generator=generator) for s in seen)
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.randn(down[-1].shape, generator=generator),
    }


@pytest.mark.parametrize("family", ["sd", "animatediff"])
def test_controlnet_residuals(family: str) -> None:
    model, call = unet(family), inputs(family)
    extra = residuals(model, call)
    plain = model(**call, return_dict=False)[0]
    assert error(model(**call, **extra, return_dict=False)[0], plain) > 0.1
    kept = [r.clone() for r in extra["down_block_additional_residuals"]]
    check(model, call | extra)
    assert all(torch.equal(a, b) for a, b in zip(kept, extra["down_block_additional_residuals"], strict=True))


def test_t2i_adapter_residuals() -> None:
    model, call = unet("sd"), inputs("sd")
    shapes = [(6, 16, 8, 8), (6, 32, 4, 4), (6, 32, 2, 2)]
    plain = model(**call, down_intrablock_additional_residuals=[torch.ones(s) for s in shapes], return_dict=False)[0]
    call["down_intrablock_additional_residuals"] = [torch.ones(s) for s in shapes]
    assert error(sliced(model, call, 3), plain) < CLOSE


@pytest.mark.parametrize("family", ["sd", "animatediff"])
def test_free_u(family: str) -> None:
    model, call = make(family).unet, inputs(family)
    plain = model(**call, return_dict=False)[0]
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert error(model(**call, return_dict=False)[0], plain) > 1e-3
    check(model, call)


@pytest.mark.parametrize("family", ["sd", "animatediff", "svd"])
def test_lora(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, call = make(family).unet, inputs(family)
    plain = model(**call, return_dict=False)[0]
    names = ["to_q", "to_out.0", "proj_out", "conv1", "conv_in", "ff.net.2"]
    names = names if family == "sd" else [name for name in names if name != "proj_out"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), model)
    assert error(model(**call, return_dict=False)[0], plain) > 1e-3
    check(model, call)


def test_free_noise_windows_and_split_inference() -> None:
    pipe, call = make("animatediff"), inputs("animatediff", 1, 6)
    pipe.motion_adapter = SimpleNamespace(config=SimpleNamespace(motion_max_seq_length=32))
    plain = pipe.unet(**call, return_dict=False)[0]
    pipe.enable_free_noise(context_length=4, context_stride=2)
    assert error(pipe.unet(**call, return_dict=False)[0], plain) > 1e-4
    check(pipe.unet, call)
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=2)
    check(pipe.unet, call)


def test_ip_adapter() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model, call = make("sd").unet, inputs("sd")
    torch.manual_seed(0)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, WIDTH, 2)])
    model.config.encoder_hid_dim_type = "ip_image_proj"
    model.set_attn_processor(
        {
            name: IPAdapterAttnProcessor2_0(model.get_submodule(name[: -len(".processor")]).inner_dim, WIDTH, (2,))
            if "attn2" in name
            else AttnProcessor2_0()
            for name in model.attn_processors
        }
    )
    check(model, call | {"added_cond_kwargs": {"image_embeds": [torch.randn(6, 1, 10)]}})


def test_attention_masks() -> None:
    call = inputs("sd")
    check(unet("sd"), call | {"encoder_attention_mask": torch.arange(7).expand(6, 7) < torch.arange(1, 7)[:, None]})


# --- who looks on -------------------------------------------------------------------------------------------------
class Mixing:
    """An attention processor that looks from one batch row at another."""

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        mean: Tensor = hidden_states.mean(0, keepdim=True).expand_as(hidden_states)
        return mean


def test_processors_that_mix_rows_run_whole_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model, call = make("sd").unet, inputs("sd")
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(Mixing())
    check(model, call)
    assert "Mixing" in caplog.text
    assert "block 0" in caplog.text


def test_hooks_see_what_they_always_saw() -> None:
    model, call = make("animatediff").unet, inputs("animatediff")
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(name, []).append(out[0] if isinstance(out, tuple) else out)

    for name in ("down_blocks.0", "mid_block", "up_blocks.0", "up_blocks.1.resnets.0", "conv_in"):
        model.get_submodule(name).register_forward_hook(watch(name))
    model(**call)
    before = {name: [t.clone() for t in tensors] for name, tensors in seen.items()}
    seen.clear()
    sliced(model, call, 4)
    for name, tensors in before.items():
        assert len(seen[name]) == 1
        assert error(seen[name][0] + 0, tensors[0]) < CLOSE, name


def test_gradients_take_the_plain_path() -> None:
    model, call = make("animatediff").unet, inputs("animatediff")
    with torch.enable_grad():
        call["sample"].requires_grad_()
        model(**call, return_dict=False)[0].square().mean().backward()
        plain = call["sample"].grad.clone()
        call["sample"].grad = None
        undo = slice_unet(model, Share(None, 4))
        model(**call, return_dict=False)[0].square().mean().backward()
        undo()
    assert torch.equal(call["sample"].grad, plain)


def test_half_precision_stays_as_close_as_half_precision_is() -> None:
    for family in ("animatediff", "svd"):
        model = make(family).unet
        call = inputs(family)
        reference = model(**call, return_dict=False)[0]
        model.to(torch.bfloat16)
        half = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in call.items()}
        plain = model(**half, return_dict=False)[0].float()
        ours = sliced(model, half, 3).float()
        assert error(ours, reference) < 1.5 * error(plain, reference)


def test_undo_leaves_nothing() -> None:
    model = make("animatediff").unet
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    undo = slice_unet(model, Share(None, 2))
    assert "forward" in model.__dict__
    undo()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
