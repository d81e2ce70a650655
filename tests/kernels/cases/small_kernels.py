"""Cases of predict, match_argmax, merge_scatter and int8_attention_qk, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import BOUND, DEVICE, DTYPES, error, noise

from diffeff.kernels.int8_attention import int8_attention_qk
from diffeff.kernels.predict import predict
from diffeff.kernels.token_match import METRICS, match_argmax, merge_scatter, token_groups, unmerge


# --- predict --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_weighted_sums(count: int, dtype: torch.dtype) -> None:
    snapshots = [noise(3, 700, dtype=dtype, seed=n) for n in range(count)]
    weights = [(-1.5) ** n for n in range(count)]
    exact = sum(w * x.double() for w, x in zip(weights, snapshots, strict=True))
    assert error(predict(snapshots, weights, kernel="triton"), exact) < BOUND[dtype]


def test_an_extrapolation_keeps_what_half_precision_would_lose() -> None:
    base = noise(1000) * 100
    snapshots = [base.bfloat16(), (base * 1.01).bfloat16(), (base * 1.02).bfloat16()]
    weights = [10.0, -21.0, 12.0]
    exact = sum(w * x.double() for w, x in zip(weights, snapshots, strict=True))
    assert error(predict(snapshots, weights, kernel="triton"), exact) < BOUND[torch.bfloat16]


def test_snapshots_in_any_dense_layout() -> None:
    snapshots = [noise(2, 4, 5, 6, seed=n).contiguous(memory_format=torch.channels_last) for n in range(2)]
    out = predict(snapshots, [2.0, -1.0], kernel="triton")
    assert out.stride() == snapshots[0].stride()
    assert error(out, 2 * snapshots[0].double() - snapshots[1].double()) < 1e-6


# --- matching and merging -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_best_matches(metric: str, dtype: torch.dtype) -> None:
    a, b = noise(2, 70, 40, dtype=dtype), noise(2, 150, 40, dtype=dtype, seed=1)
    score, index = match_argmax(a, b, metric=metric, kernel="triton")
    exact, best = match_argmax(a.double(), b.double(), metric=metric, kernel="reference")
    assert error(score, exact) < 2e-6
    assert torch.equal(index, best)


def test_equal_scores_go_to_the_lower_index() -> None:
    """Whole numbers, so that every score is exact; duplicates lie in one block of keys and in two."""
    a = torch.randint(-3, 4, (1, 20, 16), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    b = a.flip(1).repeat(1, 10, 1)
    index = match_argmax(a, b, metric="dot", kernel="triton")[1]
    assert torch.equal(index, match_argmax(a, b, metric="dot", kernel="reference")[1])
    assert index.max() < 20
    assert match_argmax(a, b, metric="negative_l2", kernel="triton")[0].abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_takes_means_and_unmerging_copies_them(dtype: torch.dtype) -> None:
    group = torch.randint(0, 5, (2, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    group[group == 3] = 0
    groups, x = token_groups(group, 6), noise(2, 20, 72, dtype=dtype)
    merged = merge_scatter(x, groups, kernel="triton")
    means = [x[row].double()[group[row] == g].mean(0).nan_to_num() for row in range(2) for g in range(6)]
    assert error(merged, torch.stack(means).unflatten(0, (2, 6))) < BOUND[dtype]
    assert not merged[:, 3].any()
    assert torch.equal(unmerge(merged, groups)[1, 7], merged[1, group[1, 7]])


# --- int8 attention -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "d"), [(65, 130, 64), (128, 64, 128), (5, 1, 40)])
def test_int8_scores(queries: int, keys: int, d: int, dtype: torch.dtype) -> None:
    q, v = noise(1, queries, 2, d, dtype=dtype).transpose(1, 2), noise(1, 2, keys, d, dtype=dtype, seed=2)
    k = (noise(1, 2, keys, d, seed=1) + 4 * noise(d, seed=3)).to(dtype)
    for smooth in (True, False):
        out, lse = int8_attention_qk(q, k, v, smooth=smooth, kernel="triton")
        exact, exact_lse = int8_attention_qk(q, k, v.float(), smooth=smooth, kernel="reference")
        # the same int8 operands, so that only the rounding of probabilities and result differs
        assert error(out, exact) < 2 * BOUND[dtype]
        assert error(lse, exact_lse) < 1e-6
    plain = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(int8_attention_qk(q, k, v, kernel="triton")[0], plain) < 0.03
