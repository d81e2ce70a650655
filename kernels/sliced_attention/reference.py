"""What `sliced_attention` means, in plain torch: the specification, the fallback, and the oracle of the kernel.

    s_ij = scale * q_i . k_n(j) + size_j + bias_ij      n = key_index
    o_i  = sum_j softmax(s_i)_j v_n(j),     lse_i = log sum_j exp s_ij

Queries are taken in slices, so that no more than one slice of scores exists at a time. Keys may also be taken in
chunks and joined by their lse (the identity behind flash attention: o = sum_c o_c exp(lse_c - lse)). A query that sees
no key gets zeros and an lse of -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BlockList", "Extras", "combine_chunks", "gathered", "reference", "sdpa"]

_SLICE_BYTES = 1 << 25
"""Scores in float32 of one query slice fit into this (32 MiB)."""


@dataclass(frozen=True)
class BlockList:
    """Which blocks of keys each block of queries looks at, in compressed rows.

    `offsets`: int32 [1 or heads, query blocks + 1] into `blocks`; `blocks`: int32, numbers of key blocks.
    """

    offsets: Tensor
    blocks: Tensor
    query_block: int
    key_block: int

    @classmethod
    def of(cls, seen: Tensor, query_block: int, key_block: int) -> BlockList:
        """From bool [query blocks, key blocks], or [heads, ...]: True where a block is to be computed."""
        seen = seen if seen.ndim == 3 else seen[None]
        counts = seen.sum(-1)
        start = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
        rows = torch.arange(seen.shape[0], device=seen.device)[:, None] * seen.shape[1]
        offsets = start[rows + torch.arange(seen.shape[1] + 1, device=seen.device)]
        return cls(offsets.int(), seen.nonzero()[:, -1].int(), query_block, key_block)

    def mask(self, queries: int, keys: int) -> Tensor:
        """The same as a bool mask [1 or heads, queries, keys]."""
        rows, columns = -(-queries // self.query_block), -(-keys // self.key_block)
        seen = torch.zeros(len(self.offsets), rows, columns, dtype=torch.bool, device=self.blocks.device)
        for head, offsets in enumerate(self.offsets.tolist()):
            for row in range(rows):
                seen[head, row, self.blocks[offsets[row] : offsets[row + 1]].long()] = True
        wide = seen.repeat_interleave(self.query_block, 1).repeat_interleave(self.key_block, 2)
        return wide[:, :queries, :keys]


@dataclass(frozen=True)
class Extras:
    """What SDPA does not offer, and the mask: see `sliced_attention` for shapes."""

    key_index: Tensor | None = None
    key_logsize: Tensor | None = None
    bias: Tensor | None = None
    blocks: BlockList | None = None

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.key_index, self.key_logsize, self.bias, self.blocks))


def reference(
    q: Tensor, k: Tensor, v: Tensor, extras: Extras, scale: float, query_slice: int = 0
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] (memory laid out [B, N, H, D]) and lse [B, H, N], sums in at least float32."""
    k, v = gathered(k, extras.key_index), gathered(v, extras.key_index)
    b, h, n, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = _like(q, v)
    lse = torch.empty(b, h, n, dtype=wide, device=q.device)
    bias = _bias(q, k, extras)
    step = query_slice or max(1, _SLICE_BYTES // max(1, 4 * b * h * k.shape[2]))
    keys, values = k.to(wide).transpose(-1, -2), v.to(wide)
    for start in range(0, n, step):
        part = slice(start, start + step)
        scores = (q[:, :, part].to(wide) * scale) @ keys
        if bias is not None:
            scores += _rows(bias, part, n).to(wide)
        lse[:, :, part] = scores.logsumexp(-1)
        scores = scores.sub_(lse[:, :, part, None].nan_to_num(neginf=0.0)).exp_()
        out[:, :, part] = scores @ values
    return out, lse


def sdpa(q: Tensor, k: Tensor, v: Tensor, extras: Extras, scale: float, query_slice: int = 0) -> Tensor:
    """The output alone, by torch's own attention on gathered keys, query slice by query slice."""
    k, v = gathered(k, extras.key_index), gathered(v, extras.key_index)
    bias = _bias(q, k, extras)
    n = q.shape[2]
    if not 0 < query_slice < n:
        return F.scaled_dot_product_attention(q, k, v, _mask(bias, slice(None), q), scale=scale)
    out = _like(q, v)
    for start in range(0, n, query_slice):
        part = slice(start, start + query_slice)
        out[:, :, part] = F.scaled_dot_product_attention(q[:, :, part], k, v, _mask(bias, part, q), scale=scale)
    return out


def combine_chunks(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and lse over all keys, from those over disjoint chunks of keys (out-of-core keys, split text and image).

    Each part is what `sliced_attention_lse` returns: [B, H, N, D] and [B, H, N]. Exact up to rounding.
    """
    if not parts:
        raise ValueError("combine_chunks needs at least one (output, lse)")
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    safe = lse.nan_to_num(neginf=0.0)
    out = sum((o.to(lse.dtype) * (part - safe).exp()[..., None] for o, part in parts), torch.zeros((), dtype=lse.dtype))
    return out.to(parts[0][0].dtype), lse


def gathered(x: Tensor, index: Tensor | None) -> Tensor:
    """[B, H, N', D]: the rows `index` ([N'] or [B, N']) of x [B, H, N, D], repeats allowed; one copy."""
    if index is None:
        return x
    if index.ndim == 1:
        return x.index_select(2, index.long())
    rows = index.long()[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, rows)


# --- masks ----------------------------------------------------------------------------------------------------------
def _bias(q: Tensor, k: Tensor, extras: Extras) -> Tensor | None:
    """Everything that is added to the scores as one additive tensor that broadcasts to them; -inf where masked."""
    total: Tensor | None = None
    if extras.bias is not None:
        total = _additive(extras.bias)
    if extras.key_logsize is not None:
        size = extras.key_logsize.float()
        size = size[:, None, None] if size.ndim == 2 else size
        total = size if total is None else total + size
    if extras.blocks is not None:
        hidden = _additive(extras.blocks.mask(q.shape[2], k.shape[2]))
        total = hidden if total is None else total + hidden
    if total is None:
        return None
    return total.reshape((1,) * (4 - total.ndim) + total.shape)


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros((), device=mask.device).where(mask, float("-inf"))


def _rows(bias: Tensor, part: slice, queries: int) -> Tensor:
    return bias if bias.shape[2] != queries or queries == 1 else bias[:, :, part]


def _mask(bias: Tensor | None, part: slice, q: Tensor) -> Tensor | None:
    return None if bias is None else _rows(bias, part, q.shape[2]).to(q.dtype)


def _like(q: Tensor, v: Tensor) -> Tensor:
    """An empty output whose memory is laid out [B, N, H, D]: heads join into channels without a copy."""
    b, h, n, _ = q.shape
    return torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
