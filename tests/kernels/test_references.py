"""The plain-torch twins: against torch's own operators in float64, under torch.compile, and with wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import error, noise
from torch.library import opcheck
from torch.overrides import TorchFunctionMode

from diffeff.kernels.group_norm import GroupStats, apply_stats, group_norm_two_pass, group_stats, joined
from diffeff.kernels.int8_attention import int8_attention_qk, quantise_blocks
from diffeff.kernels.predict import predict
from diffeff.kernels.sliced_attention import BlockList, combine_chunks, sliced_attention, sliced_attention_lse
from diffeff.kernels.targets import dense_like, listeners, pick
from diffeff.kernels.temporal_attention import temporal_attention
from diffeff.kernels.token_match import match_argmax, merge_scatter, token_groups, unmerge

CPU = torch.device("cpu")


# --- temporal attention ---------------------------------------------------------------------------------------------
def test_temporal_attention_is_sdpa_on_permuted_copies() -> None:
    q, k, v = (noise(2, 9, 5, 3, 40, seed=n).double() for n in range(3))
    bias = noise(3, 9, 9).double()
    out = temporal_attention(q, k, v, bias=bias)
    moved = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    plain = F.scaled_dot_product_attention(*moved, attn_mask=bias.float().double()).permute(0, 3, 1, 2, 4)
    assert error(out, plain) < 1e-13


def test_frame_weights_count_frames_that_often() -> None:
    q, k, v = (noise(1, 4, 3, 2, 8, seed=n).double() for n in range(3))
    double = torch.tensor([0, 0, 1, 2])
    twice = temporal_attention(q, k[:, double], v[:, double])
    weighted = temporal_attention(q, k, v, weights=torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert error(weighted, twice) < 1e-7


def test_the_output_lies_as_the_queries_do() -> None:
    x = noise(2, 7, 3, 3, 2, 8)[:, :, :, 0].transpose(1, 2)  # frames and positions swapped, a third of a projection
    assert temporal_attention(x, x, x).stride() == torch.empty(2, 7, 3, 2, 8).transpose(1, 2).stride()
    for view in (x, x.contiguous(), x.permute(3, 1, 0, 2, 4), x.expand(2, 3, 7, 2, 8)):
        assert dense_like(view).shape == view.shape
        assert torch.empty_like(dense_like(view)).stride() == dense_like(view).stride()


# --- sliced attention -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("query_slice", [0, 1, 7, 40, 99])
def test_slices_of_queries_change_nothing(query_slice: int) -> None:
    q, k, v = noise(2, 2, 40, 16).double(), noise(2, 2, 30, 16, seed=1).double(), noise(2, 2, 30, 16, seed=2).double()
    bias = noise(2, 1, 40, 30).double()
    plain = F.scaled_dot_product_attention(q, k, v, bias)
    for kernel in ("sdpa", "reference"):
        assert error(sliced_attention(q, k, v, bias=bias, query_slice=query_slice, kernel=kernel), plain) < 1e-14


def test_lse_and_empty_rows() -> None:
    q, k, v = noise(1, 2, 6, 16).double(), noise(1, 2, 9, 16, seed=1).double(), noise(1, 2, 9, 16, seed=2).double()
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[2] = False
    out, lse = sliced_attention_lse(q, k, v, bias=mask)
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~mask, float("-inf"))
    assert torch.allclose(lse, scores.logsumexp(-1))
    for zeros in (out, sliced_attention(q, k, v, bias=mask, kernel="sdpa")):
        assert not zeros[:, :, 2].any()
        assert zeros[:, :, [0, 1, 3, 4, 5]].all()
    joint, _ = combine_chunks([sliced_attention_lse(q, k[:, :, s], v[:, :, s], bias=mask[:, s]) for s in SPLIT])
    assert error(joint, out) < 1e-14


SPLIT = (slice(0, 4), slice(4, 5), slice(5, 9))


def test_gathered_keys_are_copies_of_rows() -> None:
    q, k, v = noise(2, 2, 6, 16), noise(2, 2, 9, 16, seed=1), noise(2, 2, 9, 16, seed=2)
    index = torch.tensor([[0, 0, 8], [5, 4, 3]])
    rows = torch.arange(2)[:, None]
    picked = [x.transpose(1, 2)[rows, index].transpose(1, 2) for x in (k, v)]
    assert error(sliced_attention(q, k, v, key_index=index), F.scaled_dot_product_attention(q, *picked)) < 1e-6


@pytest.mark.parametrize("heads", [1, 3])
def test_block_lists_say_what_they_were_made_of(heads: int) -> None:
    seen = torch.rand(heads, 5, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    seen[0, 2] = False
    blocks = BlockList.of(seen, 16, 32)
    assert torch.equal(blocks.mask(75, 100)[:, ::16, ::32], seen)
    assert blocks.mask(75, 100).shape == (heads, 75, 100)
    assert int(blocks.offsets[-1, -1]) == int(seen.sum()) == len(blocks.blocks)


# --- group norm -----------------------------------------------------------------------------------------------------
def test_statistics_of_strips_join_to_those_of_the_whole() -> None:
    """The left-right ramp makes every strip's own statistics wrong by far."""
    x = noise(2, 8, 5, 30).double() + torch.linspace(-50, 50, 30)
    stats = joined(group_stats(strip, 4) for strip in x.split(7, -1))
    whole = F.group_norm(x, 4)
    assert error(apply_stats(x, stats, None, None, 1e-5, False), whole) < 1e-12
    assert error(torch.cat([apply_stats(s, stats, None, None, 1e-5, False) for s in x.split(7, -1)], -1), whole) < 1e-12
    wrong = GroupStats(group_stats(x[..., :7], 4).mean, stats.m2, stats.count)
    assert error(apply_stats(x, wrong, None, None, 1e-5, False), whole) > 0.1
    with pytest.raises(ValueError, match="at least one"):
        joined([])


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_over_frames(silu: bool) -> None:
    x, weight, bias = noise(6, 8, 5, 4).double(), noise(8).double(), noise(8, seed=1).double()
    out = group_norm_two_pass(x, 2, weight, bias, silu=silu, frames=3)
    exact = F.group_norm(x.unflatten(0, (2, 3)).transpose(1, 2), 2, weight, bias).transpose(1, 2).flatten(0, 1)
    assert error(out, F.silu(exact) if silu else exact) < 1e-13


# --- predict, match, merge, int8 ------------------------------------------------------------------------------------
def test_predict_accumulates_in_float32() -> None:
    base = noise(1000) * 100
    snapshots = [base.bfloat16(), (base * 1.01).bfloat16(), (base * 1.02).bfloat16()]
    weights = [10.0, -21.0, 12.0]
    exact = sum(w * x.double() for w, x in zip(weights, snapshots, strict=True))
    naive = sum(w * x for w, x in zip(weights, snapshots, strict=True))
    assert error(predict(snapshots, weights), exact) < 3e-3 < error(torch.as_tensor(naive), exact)
    assert torch.equal(snapshots[0], base.bfloat16())


def test_matching_is_argmax_of_the_whole_matrix() -> None:
    a, b = noise(2, 50, 12).double(), noise(2, 40, 12, seed=1).double()
    score, index = match_argmax(a, b)
    whole = F.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
    assert torch.equal(index, whole.argmax(-1))
    assert torch.allclose(score, whole.amax(-1))
    distance, nearest = match_argmax(a, b, metric="negative_l2")
    assert torch.equal(nearest, torch.cdist(a, b).argmin(-1))
    assert torch.allclose(-distance, torch.cdist(a, b).amin(-1).square())


def test_merge_after_unmerge_is_the_identity() -> None:
    groups = token_groups(torch.tensor([[2, 0, 2, 1, 2], [0, 1, 2, 3, 0]]), 4)
    y = noise(2, 4, 7)
    again = merge_scatter(unmerge(y, groups), groups)
    assert torch.allclose(again[:, :3], y[:, :3])
    assert not again[0, 3].any()
    assert groups.size.tolist() == [[1, 1, 3, 0], [2, 1, 1, 1]]


def test_int8_scores_lose_less_with_smoothed_keys() -> None:
    q, v = noise(1, 2, 256, 64), noise(1, 2, 256, 64, seed=2)
    k = noise(1, 2, 256, 64, seed=1) + 4 * noise(64, seed=3)
    exact = F.scaled_dot_product_attention(q, k, v)
    smooth, lse = int8_attention_qk(q, k, v)
    assert error(smooth, exact) < 0.03
    assert error(int8_attention_qk(q, k, v, smooth=False)[0], exact) > 1.5 * error(smooth, exact)
    assert error(lse, (q @ k.transpose(-1, -2) / 8).logsumexp(-1)) < 2e-3
    packed, scale = quantise_blocks(k, 64)
    assert ((packed * scale.repeat_interleave(64, 2)[..., None] - k).abs() <= 0.501 * scale.amax()).all()


# --- registered operations ------------------------------------------------------------------------------------------
def cases() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    q = noise(1, 2, 20, 16)
    groups = token_groups(torch.zeros(1, 20, dtype=torch.int64), 2)
    mask, index = torch.ones(20, 20, dtype=torch.bool), torch.zeros(20, dtype=torch.int32)
    tail = (index, noise(20), mask, None, None, 0, 0, 0.25, 7)
    return {
        "temporal_attention": (temporal_attention, (noise(1, 4, 5, 2, 16),) * 3),
        "sliced_attention": (sliced_attention, (q, q, q)),
        "sliced_attention_lse": (sliced_attention_lse, (q, q, q)),
        "group_norm_two_pass": (group_norm_two_pass, (noise(2, 8, 4, 4), 2)),
        "predict": (lambda a, b: predict([a, b], [2.0, -1.0]), (q, q)),
        "match_argmax": (match_argmax, (q[0], q[0])),
        "merge_scatter": (lambda x: merge_scatter(x, groups), (q[0, :1],)),
        "int8_attention_qk": (int8_attention_qk, (q, q, q)),
        "sliced_attention extras": (
            lambda *x: torch.ops.diffeff.sliced_attention(*x, *tail, "reference"),
            (q.transpose(1, 2).contiguous().transpose(1, 2),) * 3,
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_torch_compile_keeps_each_whole(name: str) -> None:
    call, args = cases()[name]
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=keep, fullgraph=True)(*args)
    plain = call(*args)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any(target.startswith(f"diffeff.{name.split()[0]}") for target in targets)


def test_the_fake_results_are_shaped_and_laid_out_as_the_real_ones() -> None:
    q = noise(1, 2, 20, 16)
    x = noise(1, 5, 4, 2, 16).transpose(1, 2)
    ops = torch.ops.diffeff
    extras = (None,) * 5 + (0, 0, 0.25)
    tests = ("test_schema", "test_faketensor")
    opcheck(ops.temporal_attention, (x, x, x, None, None, 0.25, False), test_utils=tests)
    for kernel in ("sdpa", "reference"):
        opcheck(ops.sliced_attention, (q, q, q, *extras, 7, kernel), test_utils=tests)
    opcheck(ops.sliced_attention_lse, (q, q, q, *extras, 0, "reference"), test_utils=tests)
    opcheck(ops.group_norm_two_pass, (noise(2, 8, 4, 4), 2, None, None, 1e-5, True, 2, False), test_utils=tests)
    opcheck(ops.predict, ([q, q], [1.0, 2.0], False), test_utils=tests)
    opcheck(ops.match_argmax, (q[0], q[0], "dot", False), test_utils=tests)
    opcheck(ops.int8_attention_qk, (q, q, q, 0.25, True, False), test_utils=tests)


# --- refusals -------------------------------------------------------------------------------------------------------
def test_wrong_arguments_are_named() -> None:
    q, x = noise(1, 2, 20, 16), noise(1, 40, 3, 2, 16)
    with pytest.raises(ValueError, match="at most 32 frames"):
        temporal_attention(x, x, x)
    with pytest.raises(ValueError, match="head_lambda"):
        temporal_attention(x[:, :8], x[:, :8], x[:, :8], head_lambda=torch.ones(3))
    with pytest.raises(ValueError, match="batch, heads, tokens"):
        sliced_attention(q, q[:, :1], q)
    with pytest.raises(ValueError, match="key_logsize"):
        sliced_attention(q, q, q, key_logsize=torch.zeros(3))
    with pytest.raises(ValueError, match="allowed sizes"):
        sliced_attention(q, q, q, blocks=BlockList.of(torch.ones(2, 2, dtype=torch.bool), 10, 10))
    with pytest.raises(ValueError, match="no metric"):
        match_argmax(q[0], q[0], metric="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one weight per snapshot"):
        predict([q], [])
    with pytest.raises(ValueError, match="in 3 groups"):
        group_norm_two_pass(noise(2, 8, 4), 3)


def test_kernels_that_cannot_run_are_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="cannot run on cpu"):
        pick("op", "triton", CPU, "reference")
    with pytest.raises(ValueError, match="known: auto"):
        pick("op", "magic", CPU, "reference")
    with pytest.raises(ValueError, match="no kernel 'sdpa'"):
        temporal_attention(*(noise(1, 2, 2, 1, 8),) * 3, kernel="sdpa")


def test_a_default_device_is_no_listener() -> None:
    class Mode(TorchFunctionMode):
        pass

    assert not listeners()
    with torch.device("cpu"):
        assert not listeners()
        with Mode():
            assert len(listeners()) == 1
