"""KVDownsample: which keys stay, exactness where theory promises it, masks, grouped heads, positions, the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffeff.anatomy.types import CFG, AttentionSite, BlockSite, DenoiserMap, Grid
from diffeff.core.chains import AttentionTap
from diffeff.core.method import AttentionCall
from diffeff.core.run import Run, StepCall
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.tokens.kv_downsample import KVDownsample, KVDownsampleMethod, select


def site(kind: str = "self", name: str = "blocks.0.attn1", block: int = 0) -> AttentionSite:
    return AttentionSite(name, nn.Identity(), kind, 2, 8, block)


def denoiser(grid: Grid | Callable[..., Grid | None] | None, *sites: AttentionSite) -> DenoiserMap:
    sites = sites or (site(),)
    blocks = tuple(
        BlockSite(f"blocks.{i}", nn.Identity(), i, "", io=None, attentions=tuple(s for s in sites if s.block == i))
        for i in range(max(s.block for s in sites) + 1)
    )
    lookup = grid if callable(grid) else lambda site, tokens, arguments: grid
    return DenoiserMap("unet", nn.Identity(), "test", blocks, CFG.SEPARATE, True, ("hidden_states",), grid=lookup)


def a_run(model: DenoiserMap, index: int = 0, total: int = 10) -> Run:
    run = Run("test", True)
    run.clock.total, run.clock.index = total, index
    run.call = StepCall(model, "cond", (), {"hidden_states": torch.zeros(1)})
    return run


def attend(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.v, **call.options)


def apply(
    grid: Grid | None, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any] | None = None, **config: Any
) -> tuple[Tensor, AttentionCall, KVDownsampleMethod, Run]:
    """The method's output, the call that reached the kernel, the method, and the run."""
    method = KVDownsample(**({"min_tokens": 0} | config)).build()
    model = denoiser(grid)
    method.bind((model,))
    run, seen = a_run(model), []

    def proceed(call: AttentionCall) -> Tensor:
        seen.append(call)
        return attend(call)

    out = method.around_attention(run, site(), AttentionCall(q, k, v, options or {}), proceed)
    return out, seen[0], method, run


def qkv(tokens: int, heads: int = 2, batch: int = 2, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, dim)
    return q, k, v


def cellwise(grid: Grid, stride: int, temporal: int = 1, heads: int = 2, dim: int = 8) -> Tensor:
    """Random features that are constant inside every cell, for the image tokens of a grid."""
    t, h, w = (
        math.ceil(n / s)
        for n, s in zip((grid.frames, grid.height, grid.width), (temporal, stride, stride), strict=True)
    )
    x = torch.randn(1, heads, t, h, w, dim)
    x = x.repeat_interleave(temporal, 2).repeat_interleave(stride, 3).repeat_interleave(stride, 4)
    return x[:, :, : grid.frames, : grid.height, : grid.width].flatten(2, 4)


# --- selection ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 4, 4), (1, 5, 7), (3, 9, 4), (2, 1, 6), (1, 1, 1)])
@pytest.mark.parametrize("temporal", [1, 2])
def test_number_of_keys_and_weights(size: tuple[int, int, int], stride: int, temporal: int) -> None:
    grid = Grid(*size)
    chosen = select(grid, stride, temporal)
    keys = math.ceil(size[0] / temporal) * math.ceil(size[1] / stride) * math.ceil(size[2] / stride)
    assert len(chosen.index) == keys
    assert float(chosen.weight.sum()) == grid.image_tokens
    assert torch.equal(chosen.index, chosen.index.unique())
    assert int(chosen.index.max()) < grid.image_tokens


def test_the_centre_of_each_cell_and_the_first_of_each_pair_of_frames_is_kept() -> None:
    assert select(Grid(1, 1, 7), 2).index.tolist() == [1, 3, 5, 6]
    assert select(Grid(1, 1, 7), 3).index.tolist() == [1, 4, 6]
    assert select(Grid(1, 1, 8), 4).index.tolist() == [2, 6]
    assert select(Grid(1, 4, 4), 2).index.tolist() == [5, 7, 13, 15]
    assert select(Grid(5, 1, 1), 1, 2).index.tolist() == [0, 2, 4]


def test_even_strides_agree_with_nearest_exact_resampling() -> None:
    for stride in (2, 3, 4):
        rows = torch.arange(12.0 * 12).view(1, 1, 12, 12)
        wanted = F.interpolate(rows, scale_factor=1 / stride, mode="nearest-exact").flatten().long()
        assert torch.equal(select(Grid(1, 12, 12), stride).index, wanted)


@pytest.mark.parametrize("first", [True, False])
def test_text_keys_all_stay_where_they_are(first: bool) -> None:
    chosen = select(Grid(1, 4, 4, text=3, text_first=first), 2)
    assert len(chosen.index) == 7
    text = [0, 1, 2] if first else [16, 17, 18]
    assert set(text) <= set(chosen.index.tolist())
    assert [float(w) for i, w in zip(chosen.index, chosen.weight, strict=True) if int(i) in text] == [1, 1, 1]
    assert chosen.index.tolist() == sorted(chosen.index.tolist())


# --- exactness ------------------------------------------------------------------------------------------------------
def test_stride_one_is_bit_exact_and_says_so() -> None:
    q, k, v = qkv(24)
    out, call, method, run = apply(Grid(1, 4, 6), q, k, v, stride=1)
    assert call.k is k
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert method.engaged(run) == (False, "the stride keeps every key; the largest has 24 image tokens")


@pytest.mark.parametrize(("stride", "temporal"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_features_constant_in_each_cell_give_the_exact_result(stride: int, temporal: int) -> None:
    grid = Grid(2, 6, 12)
    q, k, v = qkv(grid.image_tokens, batch=1)
    k, v = cellwise(grid, stride, temporal), cellwise(grid, stride, temporal)
    out, call, *_ = apply(grid, q, k, v, stride=stride, temporal_stride=temporal)
    assert call.k.shape[2] == grid.image_tokens // (stride**2 * temporal)
    assert call.options["attn_mask"] is None
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 4, 6), (1, 5, 7), (3, 5, 4)])
@pytest.mark.parametrize("first", [True, False])
def test_joint_attention_keeps_the_balance_of_text_and_image_exactly(size: tuple[int, int, int], first: bool) -> None:
    """Also with odd sizes: each key weighs as many tokens as its own cell holds."""
    grid = Grid(*size, text=5, text_first=first)
    q, *_ = qkv(grid.image_tokens + 5, batch=1)

    def sequence() -> Tensor:
        text, image = torch.randn(1, 2, 5, 8), cellwise(grid, 2, 2)
        return torch.cat([text, image] if first else [image, text], 2)

    k, v = sequence(), sequence()
    out, call, *_ = apply(grid, q, k, v, stride=2, temporal_stride=2)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(out, exact, atol=1e-6)
    without = F.scaled_dot_product_attention(q, call.k, call.v)
    assert (without - exact).abs().max() > 0.05


def test_odd_sizes_without_text_err_little() -> None:
    grid = Grid(1, 15, 15)
    q, *_ = qkv(225, batch=1)
    k, v = cellwise(grid, 2), cellwise(grid, 2)
    out, call, *_ = apply(grid, q, k, v)
    assert call.k.shape[2] == 64
    exact = F.scaled_dot_product_attention(q, k, v)
    assert 0 < (out - exact).norm() / exact.norm() < 0.3


def test_grouped_heads() -> None:
    grid = Grid(1, 4, 4)
    q = torch.randn(1, 4, 16, 8)
    k, v = cellwise(grid, 2), cellwise(grid, 2)
    out, *_ = apply(grid, q, k, v, {"enable_gqa": True})
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=1e-6)


def test_scale_and_other_options_reach_the_kernel() -> None:
    q, k, v = qkv(16)
    _, call, *_ = apply(Grid(1, 4, 4), q, k, v, {"scale": 0.5, "dropout_p": 0.0, "is_causal": False})
    assert {k: call.options[k] for k in ("scale", "dropout_p", "is_causal")} == {
        "scale": 0.5,
        "dropout_p": 0.0,
        "is_causal": False,
    }


# --- masks ----------------------------------------------------------------------------------------------------------
MASKS = {
    "per key": lambda n: torch.rand(1, 1, 1, n) > 0.3,
    "per query and key": lambda n: torch.rand(n, n) > 0.3,
    "per head": lambda n: torch.rand(1, 2, n, n) > 0.3,
    "broadcast": lambda n: torch.ones(1, 1, n, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("shape", list(MASKS))
def test_masks_follow_their_keys(shape: str, text: int, additive: bool) -> None:
    torch.manual_seed(0)
    grid = Grid(1, 4, 6, text=text)
    n = 24 + text
    q, k, v = qkv(n, batch=1)
    mask = MASKS[shape](n)
    mask[..., 0] = True
    given = torch.where(mask, 0.0, float("-inf")) if additive else mask
    if additive and shape != "broadcast":
        given = given + torch.randn_like(given)
    out, call, *_ = apply(grid, q, k, v, {"attn_mask": given})
    chosen = select(grid, 2)
    scores = (q @ k[:, :, chosen.index].transpose(-1, -2)) / math.sqrt(8)
    full = given.expand(1, 2, n, n)[..., chosen.index]
    scores = scores + full if additive else scores.masked_fill(~full, float("-inf"))
    if text:
        scores = scores + chosen.weight.log()
    assert torch.allclose(out, scores.softmax(-1) @ v[:, :, chosen.index], atol=1e-5, equal_nan=True)
    assert text or call.options["attn_mask"].dtype == given.dtype


def test_the_bias_takes_the_dtype_of_the_queries() -> None:
    q, k, v = (x.bfloat16() for x in qkv(19))
    out, call, *_ = apply(Grid(1, 4, 4, text=3), q, k, v)
    assert call.options["attn_mask"].dtype is out.dtype is torch.bfloat16


# --- where it acts --------------------------------------------------------------------------------------------------
def left(method: KVDownsampleMethod, run: Run) -> str:
    return "; ".join(method.details(run)["left"])


@pytest.mark.parametrize(
    ("grid", "config", "options", "reason"),
    [
        (None, {}, {}, "unknown"),
        (Grid(1, 3, 3), {}, {}, "do not lie on the grid"),
        (Grid(1, 4, 4), {"min_tokens": 17}, {}, "min_tokens=17"),
        (Grid(1, 4, 4), {}, {"is_causal": True}, "causal"),
        (Grid(16, 1, 1), {}, {}, "keeps every key"),
    ],
)
def test_left_alone_with_a_reason(
    grid: Grid | None, config: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    q, k, v = qkv(16)
    out, call, method, run = apply(grid, q, k, v, options, **config)
    assert call.k is k
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **options))
    assert method.engaged(run)[0] is False
    assert reason in left(method, run)
    assert reason in method.engaged(run)[1]


def test_keys_of_another_length_are_left_alone() -> None:
    q, k, v = qkv(16)
    *_, method, run = apply(Grid(1, 4, 4), q, k[:, :, :5], v[:, :, :5])
    assert "16 queries and 5 keys" in left(method, run)


def test_only_the_finest_grid_unless_told_otherwise() -> None:
    sites = [site(name=n) for n in ("down.fine", "down.coarse", "up.fine")]
    grids = {"down.fine": Grid(1, 8, 8), "down.coarse": Grid(1, 4, 4), "up.fine": Grid(1, 8, 8)}
    model = denoiser(lambda s, tokens, arguments: grids[s.name], *sites)
    for top, wanted in ((True, {"down.fine", "up.fine"}), (False, set(grids))):
        method, run = KVDownsample(min_tokens=0, top_resolution=top).build(), a_run(model)
        for s in sites:
            method.around_attention(run, s, AttentionCall(*qkv(grids[s.name].image_tokens), {}), attend)
        assert set(method.details(run)["keys"]) == wanted
        assert method.details(run)["keys"]["down.fine"] == [64, 16]
        assert method.engaged(run) == (True, f"{len(wanted)} attentions, at most 64 keys each cut to 16")


@pytest.mark.parametrize(("index", "acts"), [(0, False), (2, True), (4, True), (5, False)])
def test_window_of_progress(index: int, acts: bool) -> None:
    model = denoiser(Grid(1, 4, 4))
    method, run = KVDownsample(min_tokens=0, start=0.2, stop=0.5).build(), a_run(model, index)
    seen: list[int] = []

    def proceed(call: AttentionCall) -> Tensor:
        seen.append(call.k.shape[2])
        return attend(call)

    method.around_attention(run, site(), AttentionCall(*qkv(16), {}), proceed)
    assert seen == [4 if acts else 16]
    if not acts:
        assert "window" in method.engaged(run)[1]


def test_kinds_and_blocks() -> None:
    kinds = ("self", "cross", "temporal", "joint", "self")
    sites = [site(kind, f"blocks.{i}.attn", i) for i, kind in enumerate(kinds)]
    model = denoiser(None, *sites)
    method = KVDownsample().build()
    assert [s.block for s in method.attention_sites(model)] == [0, 3, 4]
    assert next(iter(method.claimed(model).values())) == {"blocks.0.attn", "blocks.3.attn", "blocks.4.attn"}
    assert "3 self-attentions" in method.inspect(model)
    assert [s.block for s in KVDownsample(first_block=1, last_block=3).build().attention_sites(model)] == [3]
    with pytest.raises(MethodInapplicable, match=r"blocks 1 to 2"):
        KVDownsample(first_block=1, last_block=2).build().bind((model,))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 0},
        {"stride": 9},
        {"temporal_stride": 0},
        {"start": 0.5, "stop": 0.5},
        {"first_block": 3, "last_block": 2},
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kv_downsample"):
        KVDownsample(**options)


# --- real attention modules -----------------------------------------------------------------------------------------
def tapped(module: nn.Module, model: DenoiserMap, kind: str, *args: Any, **kwargs: Any) -> Tensor:
    where = AttentionSite("attn", module, kind, 2, 12, 0)
    with torch.no_grad(), AttentionTap(a_run(model), where, [KVDownsample(min_tokens=0).build()]):
        return module(*args, **kwargs)


def test_positions_stay_true_in_a_rotary_transformer() -> None:
    """Against an explicit computation: rotate all keys by their own positions, then take some of them."""
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

    torch.manual_seed(0)
    attn = WanAttention(24, heads=2, dim_head=12, processor=WanAttnProcessor()).eval()
    rope = WanRotaryPosEmbed(12, (1, 2, 2), 32)
    rotary = rope(torch.zeros(1, 4, 2, 8, 12))
    grid, x = Grid(2, 4, 6), torch.randn(1, 48, 24)
    out = tapped(attn, denoiser(grid), "self", x, rotary_emb=rotary)

    def rotated(y: Tensor) -> Tensor:
        cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    with torch.no_grad():
        q = rotated(attn.norm_q(attn.to_q(x)).unflatten(-1, (2, 12)))
        k = rotated(attn.norm_k(attn.to_k(x)).unflatten(-1, (2, 12)))
        v = attn.to_v(x).unflatten(-1, (2, 12))
        index = select(grid, 2).index
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k[:, index]).div(math.sqrt(12)).softmax(-1)
        wanted = attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v[:, index]).flatten(2))
    assert torch.allclose(out, wanted, atol=1e-5)


def test_a_unet_attention_equals_the_explicit_computation() -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn, x = Attention(24, heads=2, dim_head=12).eval(), torch.randn(2, 35, 24)
    grid = Grid(1, 5, 7)
    out = tapped(attn, denoiser(grid), "self", x)
    with torch.no_grad():
        few = x[:, select(grid, 2).index]
        q, k, v = (
            m(y).unflatten(-1, (2, 12)).transpose(1, 2) for m, y in ((attn.to_q, x), (attn.to_k, few), (attn.to_v, few))
        )
        wanted = attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(out, wanted, atol=1e-6)


# --- whole pipelines ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "sd3", "dit", "sd", "animatediff"])
def test_pipelines(family: str) -> None:
    from tiny import make, run

    from diffeff import DiffEffPipeline

    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=2)
    pipe.apply([KVDownsample(stride=1)])
    assert torch.equal(run(family, pipe, steps=2), plain)
    assert pipe.report.methods[0].engaged is False
    pipe.apply([KVDownsample(min_tokens=0)])
    few = run(family, pipe, steps=2)
    outcome = pipe.report.methods[0]
    assert outcome.engaged, outcome.reason
    assert all(after < before for before, after in outcome.details["keys"].values())
    assert 0 < (few - plain).norm() / plain.norm() < 0.5
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=2), plain)
