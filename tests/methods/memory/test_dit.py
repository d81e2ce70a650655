"""Sliced transformers: the plain model's result, at a lower peak, with nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from denoiser_calls import captured, forward, relative, sliced
from torch import nn

from diffeff.errors import ForeignPatchError, MethodInapplicable, PlanConflict
from diffeff.methods.memory import dit_block
from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit import slice_dit
from diffeff.methods.memory.dit_engine import run
from diffeff.methods.memory.live import live_activations

FAMILIES = ["wan", "wan-i2v", "ltx", "pixart", "cogvideox", "hunyuanvideo", "flux", "sd3"]
COUNTS = [1, 2, 3, 5, 7, 10**6]
TOLERANCE = 1e-5


def blocks(model: Any) -> list[nn.Module]:
    stacks = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for stack in stacks for block in getattr(model, stack, ())]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- exactness ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "guidance"), [(1, False), (1, True), (2, True)])
def test_equals_the_plain_model_at_every_count(family: str, batch: int, guidance: bool) -> None:
    if family == "wan-i2v" and batch > 1:
        pytest.skip("its pipeline takes one image")
    model, call = captured(family, batch=batch, guidance=guidance)
    plain = forward(model, call)
    for count in COUNTS:
        with sliced(model, count):
            assert relative(forward(model, call), plain) < TOLERANCE, count
    assert torch.equal(forward(model, call), plain)


SIZES = {"wan": (1, 2, 6), "ltx": (3, 5, 7), "pixart": (6, 10), "cogvideox": (3, 6, 10), "hunyuanvideo": (1, 6, 10)}


@pytest.mark.parametrize("family", SIZES)
def test_odd_numbers_of_tokens_and_single_frames(family: str) -> None:
    model, call = captured(family, size=SIZES[family])
    plain = forward(model, call)
    for count in COUNTS:
        with sliced(model, count):
            assert relative(forward(model, call), plain) < TOLERANCE, count


@pytest.mark.parametrize("family", ["ltx", "pixart", "hunyuanvideo"])
def test_padded_text_stays_masked(family: str) -> None:
    model, (args, kwargs) = captured(family, batch=2)
    mask = kwargs["encoder_attention_mask"].clone()
    mask[:, 1:] = 0
    mask[0, 2] = 1
    call = args, {**kwargs, "encoder_attention_mask": mask}
    plain = forward(model, call)
    assert relative(forward(model, (args, kwargs)), plain) > TOLERANCE
    with sliced(model):
        assert relative(forward(model, call), plain) < TOLERANCE


def test_one_timestep_per_token() -> None:
    """Wan 2.2 TI2V and LTX image to video give every token its own."""
    for family in ("wan", "ltx"):
        model, (args, kwargs) = captured(family)
        rows = kwargs["hidden_states"].shape[0]
        tokens = 72
        steps = torch.linspace(0, 999, rows * tokens).reshape(rows, tokens)
        call = args, {**kwargs, "timestep": steps}
        plain = forward(model, call)
        for count in COUNTS:
            with sliced(model, count):
                assert relative(forward(model, call), plain) < TOLERANCE, (family, count)


def test_first_frame_modulated_apart() -> None:
    shared, call = captured("hunyuanvideo")
    model = type(shared).from_config(shared.config, image_condition_type="token_replace").eval()
    plain = forward(model, call)
    for count in COUNTS:
        with sliced(model, count):
            assert relative(forward(model, call), plain) < TOLERANCE, count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_or_none_gives_the_same(family: str) -> None:
    model, call = captured(family)
    plain = forward(model, call)
    for limit in (None, 1, 200_000, 10**9):
        with sliced(model, None, limit):
            assert relative(forward(model, call), plain) < TOLERANCE, limit


def test_half_precision_rounds_where_the_plain_model_does() -> None:
    model, (args, kwargs) = captured("wan")
    model = diffusers.WanTransformer3DModel.from_config(model.config).eval()
    exact = forward(model, (args, kwargs))
    model.to(torch.bfloat16)
    cast = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    plain = forward(model, (args, cast))
    with sliced(model):
        out = forward(model, (args, cast))
    assert out.dtype is torch.bfloat16
    assert relative(out.float(), exact) < 1.5 * relative(plain.float(), exact) + 1e-3


# --- adapters -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "sd3"])
def test_lora(family: str) -> None:
    from peft import LoraConfig

    shared, call = captured(family)
    model = type(shared).from_config(shared.config).eval()
    model.load_state_dict(shared.state_dict())
    bare = forward(model, call)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    plain = forward(model, call)
    assert relative(bare, plain) > TOLERANCE
    with sliced(model):
        assert relative(forward(model, call), plain) < TOLERANCE


def test_flux_ip_adapter() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    shared, (args, kwargs) = captured("flux")
    model = diffusers.FluxTransformer2DModel.from_config(shared.config).eval()
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 20, num_tokens=(4, 6), scale=[0.7, 0.4]))
    images = [torch.randn(1, tokens, 20) for tokens in (4, 6)]
    call = args, {**kwargs, "joint_attention_kwargs": {"ip_hidden_states": images}}
    plain = forward(model, call)
    for count in COUNTS:
        with sliced(model, count):
            assert relative(forward(model, call), plain) < TOLERANCE, count


def test_sd3_ip_adapter_on_both_attentions() -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    shared, (args, kwargs) = captured("sd3")
    model = diffusers.SD3Transformer2DModel.from_config(shared.config).eval()
    model.set_attn_processor(
        {name: SD3IPAdapterJointAttnProcessor2_0(16, 20, 8, timesteps_emb_dim=12) for name in model.attn_processors}
    )
    rows = kwargs["hidden_states"].shape[0]
    image = {"ip_hidden_states": torch.randn(rows, 5, 20), "temb": torch.randn(rows, 12)}
    call = args, {**kwargs, "joint_attention_kwargs": image}
    plain = forward(model, call)
    assert relative(forward(model, (args, kwargs)), plain) > TOLERANCE
    for count in COUNTS:
        with sliced(model, count):
            assert relative(forward(model, call), plain) < TOLERANCE, count


# --- memory -------------------------------------------------------------------------------------------------------
LARGE = {
    "wan": (3, 24, 32),
    "ltx": (3, 16, 24),
    "pixart": (40, 48),
    "cogvideox": (3, 24, 32),
    "hunyuanvideo": (3, 24, 32),
    "flux": (40, 48),
    "sd3": (32, 32),
}


@pytest.mark.parametrize("family", LARGE)
def test_the_peak_falls(family: str) -> None:
    model, call = captured(family, size=LARGE[family])
    peaks = [_peak(model, call)]
    for slices in (4, 16):
        with sliced(model, slices):
            peaks.append(_peak(model, call))
    assert peaks[0] > 1.5 * peaks[1] > 1.5 * peaks[2], peaks


def _peak(model: nn.Module, call: Any) -> int:
    with live_activations() as live:
        forward(model, call)
    return live.peak


@pytest.mark.parametrize("family", ["wan", "ltx", "flux", "sd3"])
def test_streams_are_written_in_place_where_nobody_looks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reused: list[bool] = []

    def note(work: Any, share: Share, temporaries: int, reuse: Any = ()) -> Any:
        reused.append(all(reuse))
        return run(work, share, temporaries, reuse)

    monkeypatch.setattr(dit_block, "run", note)
    model, call = captured(family)
    with sliced(model):
        forward(model, call)
    assert reused[1:] == [True] * (len(blocks(model)) - 1)


def test_what_a_hook_has_seen_is_not_overwritten() -> None:
    model, call = captured("wan")
    seen: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    with sliced(model):
        alone = forward(model, call)
        hooks = [b.register_forward_hook(lambda m, a, out: seen.append(out)) for b in model.blocks]
        hooks += [b.register_forward_hook(lambda m, a, out: copies.append(out.clone())) for b in model.blocks]
        watched = forward(model, call)
        for hook in hooks:
            hook.remove()
    assert torch.equal(alone, watched)
    assert len({t.data_ptr() for t in seen}) == len(model.blocks)
    assert all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_left_alone(family: str) -> None:
    model, call = captured(family)
    before = {k: v.clone() for k, v in call[1].items() if isinstance(v, torch.Tensor)}
    with sliced(model):
        first, second = forward(model, call), forward(model, call)
    assert torch.equal(first, second)
    assert all(torch.equal(call[1][k], v) for k, v in before.items())


def test_queries_are_never_whole() -> None:
    model, call = captured("wan", size=(3, 8, 12))
    shapes: list[tuple[int, ...]] = []
    hooks = [
        b.attn1.to_q.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape))) for b in model.blocks
    ]
    with sliced(model, 4):
        forward(model, call)
    for hook in hooks:
        hook.remove()
    assert {shape[1] for shape in shapes} == {18}


# --- undo and refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_undo_leaves_nothing(family: str) -> None:
    model, call = captured(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    plain = forward(model, call)
    undo = slice_dit(model, Share(None, 4))
    assert "forward" in vars(blocks(model)[0])
    undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(forward(model, call), plain)


def test_refuses_transformers_it_does_not_know() -> None:
    with pytest.raises(MethodInapplicable, match="WanVACETransformer3DModel"):
        slice_dit(captured("wan-vace")[0], Share(None, 2))


class _Mine:
    """A processor of another tool."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_refuses_a_strangers_processor_before_and_after() -> None:
    model, call = captured("wan")
    attn = model.blocks[2].attn1
    own = attn.processor
    try:
        with sliced(model):
            attn.processor = _Mine(own)
            with pytest.raises(PlanConflict, match=r"blocks\.2\.attn1.*_Mine"):
                forward(model, call)
        with pytest.raises(PlanConflict, match="_Mine"):
            slice_dit(model, Share(None, 2))
        assert not any("forward" in vars(block) for block in model.blocks)
    finally:
        attn.processor = own


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
def test_refuses_fused_projections(family: str) -> None:
    shared, _ = captured(family)
    model = type(shared).from_config(shared.config).eval()
    getattr(model, "fuse_qkv_projections")()  # noqa: B009 (not on every class)
    with pytest.raises(PlanConflict, match=r"[Ff]used"):
        slice_dit(model, Share(None, 2))


def test_with_gradients_blocks_run_their_plain_forward() -> None:
    model, (args, kwargs) = captured("wan")

    def gradient() -> torch.Tensor:
        latents = kwargs["hidden_states"].clone().requires_grad_()
        with torch.enable_grad():
            model(*args, **{**kwargs, "hidden_states": latents})[0].square().sum().backward()
        assert latents.grad is not None
        return latents.grad

    plain = gradient()
    with sliced(model):
        assert relative(gradient(), plain) < TOLERANCE


def _patched(module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


def test_refuses_blocks_that_another_tool_has_patched() -> None:
    model, _ = captured("wan")
    block = model.blocks[1]
    block.forward = _patched(block)
    try:
        with pytest.raises(PlanConflict, match="replaced by another tool"):
            slice_dit(model, Share(None, 2))
        assert "forward" not in vars(model.blocks[0])
    finally:
        del block.forward


def test_says_so_when_someone_has_taken_its_place() -> None:
    model, _ = captured("wan")
    undo = slice_dit(model, Share(None, 2))
    block = model.blocks[0]
    ours = block.forward
    block.forward = _patched(block)
    with pytest.raises(ForeignPatchError, match="after feature_slicing"):
        undo()
    block.forward = ours
    del block.forward
