"""Cases of the sliced attention kernel, interpreted or on a GPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import BOUND, DEVICE, DTYPES, error, noise
from torch import Tensor

from diffeff.kernels.sliced_attention import BlockList, combine_chunks, sliced_attention, sliced_attention_lse

# batch, heads, queries, keys, head_dim
SHAPES = [
    (1, 2, 33, 65, 40),
    (2, 1, 1, 1, 64),
    (1, 1, 63, 77, 72),
    (1, 2, 5, 128, 80),
    (2, 1, 128, 17, 128),
    (1, 1, 70, 40, 160),
]
Three = tuple[Tensor, Tensor, Tensor]


def operands(b: int, h: int, n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> Three:
    """Heads split off channels, as attention modules do: strided views, none contiguous for more than one head."""
    q, k, v = (
        noise(b, n, h, d, dtype=dtype),
        noise(b, m, h, d, dtype=dtype, seed=1),
        noise(b, m, h, d, dtype=dtype, seed=2),
    )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def check(three: Three, **extras: Any) -> tuple[Tensor, Tensor]:
    """The kernel's output and lse, after comparison with the reference."""
    q, k, v = three
    out, lse = sliced_attention_lse(q, k, v, kernel="triton", **extras)
    wide = (x.double() for x in three)
    exact, exact_lse = sliced_attention_lse(*wide, kernel="reference", **extras)
    assert out.dtype is q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert error(out, exact) < BOUND[q.dtype]
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse.double() - exact_lse)[seen].abs().max() < 5e-6
    assert torch.equal(sliced_attention(q, k, v, kernel="triton", **extras), out)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_awkward_shapes(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    check(operands(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_gathered_keys_with_repeats_and_sizes(per_row: bool, dtype: torch.dtype) -> None:
    three = operands(2, 2, 33, 50, 40, dtype=dtype)
    shape = (2, 70) if per_row else (70,)
    index = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    index[..., -3:] = 7
    out, _ = check(three, key_index=index, key_logsize=noise(*shape))
    assert error(out, sliced_attention(*three, key_index=index)) > 1e-2


def test_merged_keys_with_their_sizes_stand_for_all() -> None:
    """Keys that occur twice, kept once with size 2, give what all keys give: proportional attention is exact."""
    q, k, v = operands(1, 2, 20, 30, 40)
    twice = torch.arange(30, device=DEVICE).repeat_interleave(torch.tensor([2] * 10 + [1] * 20, device=DEVICE))
    size = torch.tensor([2.0] * 10 + [1.0] * 20, device=DEVICE).log()
    merged = sliced_attention(q, k, v, key_logsize=size, kernel="triton")
    assert error(merged, sliced_attention(q, k, v, key_index=twice.int(), kernel="triton")) < 1e-6
    assert error(merged, sliced_attention(q, k, v, kernel="triton")) > 1e-2


@pytest.mark.parametrize("shape", [(40, 50), (1, 2, 1, 50), (2, 1, 40, 50), (2, 2, 40, 1)], ids=str)
def test_broadcast_biases(shape: tuple[int, ...]) -> None:
    check(operands(2, 2, 40, 50, 72), bias=noise(*shape))


def test_masks_with_an_empty_row() -> None:
    mask = noise(2, 1, 40, 70) > 0
    mask[1, 0, 5] = False
    out, lse = check(operands(2, 2, 40, 70, 40), bias=mask)
    assert torch.equal(out[1, :, 5], torch.zeros_like(out[1, :, 5]))
    assert (lse[1, :, 5] == float("-inf")).all()


@pytest.mark.parametrize("heads", [1, 2])
def test_block_lists(heads: int) -> None:
    seen = noise(heads, 4, 5) > 0
    seen[:, 1] = False
    blocks = BlockList.of(seen, 16, 16)
    out, _ = check(operands(2, 2, 60, 75, 40), blocks=blocks)
    assert not out[:, :, 16:32].any()


def test_chunks_of_keys_join_to_the_whole() -> None:
    q, k, v = operands(1, 2, 33, 100, 40)
    mask = torch.ones(33, 100, dtype=torch.bool, device=DEVICE)
    mask[3, :40] = mask[4] = False
    chunks = ((0, 40), (40, 41), (41, 100))
    parts = [sliced_attention_lse(q, k[:, :, a:b], v[:, :, a:b], bias=mask[:, a:b], kernel="triton") for a, b in chunks]
    out, lse = combine_chunks(parts)
    whole, whole_lse = check((q, k, v), bias=mask)
    assert error(out, whole) < 1e-6
    assert torch.equal(lse.isfinite(), whole_lse.isfinite())
    assert not out[:, :, 4].any()


def test_values_of_another_width_and_a_scale() -> None:
    q, k, _ = operands(1, 2, 20, 30, 40)
    check((q, k, noise(1, 2, 30, 72)), scale=0.4)


def test_no_queries() -> None:
    q, k, v = operands(1, 2, 0, 30, 40)
    assert sliced_attention(q, k, v, kernel="triton").shape == q.shape
