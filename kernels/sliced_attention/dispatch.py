"""`sliced_attention`: one call for kernel, SDPA and reference, registered so that torch.compile keeps it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from diffeff.kernels.sliced_attention.reference import BlockList, Extras, reference, sdpa
from diffeff.kernels.targets import pick, runs_triton

__all__ = ["sliced_attention", "sliced_attention_lse"]

_BLOCKS = (16, 32, 64, 128)
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_index, Tensor? key_logsize, Tensor? bias, Tensor? offsets, "
    "Tensor? blocks, int query_block, int key_block, float scale, int query_slice, str kernel) -> "
)


def sliced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_index: Tensor | None = None,
    key_logsize: Tensor | None = None,
    bias: Tensor | None = None,
    blocks: BlockList | None = None,
    scale: float | None = None,
    query_slice: int = 0,
    kernel: str = "auto",
) -> Tensor:
    """Attention that never holds more than a slice of its scores, with what torch's own does not offer.

    `q`: [B, H, N, D]; `k`, `v`: [B, H, M, D] in any strides. `key_index`: int [M'] or [B, M'], the rows of k and v to
    attend to, repeats allowed, read in place; out of range is undefined on CUDA. `key_logsize`: float [M'] or [B, M'],
    added to the scores: the log of how many tokens a key stands for. `bias`: additive, or bool with True where a key
    is seen; broadcasts to [B, H, N, M'] without a copy. `blocks`: only these blocks of keys (Triton: sizes 16, 32, 64,
    128). `scale` defaults to D**-0.5. `query_slice` cuts the queries in the plain-torch kernels (0: all for SDPA, a
    bounded slice for the reference). Returns [B, H, N, D], laid out [B, N, H, D] in memory where Triton or a slice made
    it. A query that sees no key gets zeros. Forward only.

    Rule of kernel="auto": SDPA where nothing but a mask is asked for (its backends are at least as fast there), Triton
    on CUDA with the rest, SDPA on gathered keys elsewhere. Raises ValueError for shapes that do not fit.
    """
    extras = _checked(q, k, v, Extras(key_index, key_logsize, bias, blocks))
    auto = "triton" if _pays(q, k, extras) else "sdpa"
    chosen = pick("sliced_attention", kernel, q.device, auto)
    result: Tensor = _op(*_flat(q, k, v, extras, scale), query_slice, chosen)
    return result


def sliced_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_index: Tensor | None = None,
    key_logsize: Tensor | None = None,
    bias: Tensor | None = None,
    blocks: BlockList | None = None,
    scale: float | None = None,
    query_slice: int = 0,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`sliced_attention` and the logsumexp [B, H, N] of the scores, for `combine_chunks` and importance maps.

    Arguments as there; Triton on CUDA, the reference elsewhere.
    """
    extras = _checked(q, k, v, Extras(key_index, key_logsize, bias, blocks))
    chosen = pick("sliced_attention_lse", kernel, q.device, "triton" if _runs(q) else "reference")
    if chosen == "sdpa":
        raise ValueError("sliced_attention_lse has no kernel 'sdpa'; known: auto, triton, reference")
    result: tuple[Tensor, Tensor] = _op_lse(*_flat(q, k, v, extras, scale), query_slice, chosen)
    return result


def _runs(q: Tensor) -> bool:
    return q.is_cuda and runs_triton(q.device) and q.dtype is not torch.float64


def _pays(q: Tensor, k: Tensor, extras: Extras) -> bool:
    more = any(x is not None for x in (extras.key_index, extras.key_logsize, extras.blocks))
    return more and _runs(q)


# --- checks ---------------------------------------------------------------------------------------------------------
def _checked(q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Extras:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]):
        raise ValueError(f"sliced_attention takes [batch, heads, tokens, head_dim], not {shapes}")
    if k.shape[2] != v.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"sliced_attention needs as many keys as values and one width of q and k: {shapes}")
    keys = k.shape[2] if extras.key_index is None else extras.key_index.shape[-1]
    size = extras.key_logsize
    if size is not None and size.shape[-1] != keys:
        raise ValueError(f"key_logsize {tuple(size.shape)} needs one value for each of the {keys} keys")
    blocks = extras.blocks
    if blocks is not None and not (blocks.query_block in _BLOCKS and blocks.key_block in _BLOCKS):
        raise ValueError(f"blocks of {blocks.query_block} by {blocks.key_block}; allowed sizes: {_BLOCKS}")
    if blocks is not None and blocks.offsets.shape[-1] != -(-q.shape[2] // blocks.query_block) + 1:
        raise ValueError(f"the block list has {blocks.offsets.shape[-1] - 1} rows; {q.shape[2]} queries need another")
    return extras


# --- registered operations ------------------------------------------------------------------------------------------
_Flat = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, float
]


def _flat(q: Tensor, k: Tensor, v: Tensor, e: Extras, scale: float | None) -> _Flat:
    """The operands as a registered operation takes them: tensors and numbers only."""
    size = None if e.key_logsize is None else e.key_logsize.float()
    lists = (None, None, 0, 0)
    blocks = e.blocks
    if blocks is not None:
        lists = (blocks.offsets, blocks.blocks, blocks.query_block, blocks.key_block)  # type: ignore[assignment]
    return q, k, v, e.key_index, size, e.bias, *lists, q.shape[-1] ** -0.5 if scale is None else scale


def _extras(
    key_index: Tensor | None,
    key_logsize: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    blocks: Tensor | None,
    query_block: int,
    key_block: int,
) -> Extras:
    listed = None if offsets is None or blocks is None else BlockList(offsets, blocks, query_block, key_block)
    return Extras(key_index, key_logsize, bias, listed)


@torch.library.custom_op("diffeff::sliced_attention", mutates_args=(), schema=_SCHEMA + "Tensor")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_index: Tensor | None,
    key_logsize: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    blocks: Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    query_slice: int,
    kernel: str,
) -> Tensor:
    extras = _extras(key_index, key_logsize, bias, offsets, blocks, query_block, key_block)
    if kernel == "sdpa":
        return _laid_out(sdpa(q, k, v, extras, scale, query_slice))
    return _attend(q, k, v, extras, scale, query_slice, kernel)[0]


@torch.library.custom_op("diffeff::sliced_attention_lse", mutates_args=(), schema=_SCHEMA + "(Tensor, Tensor)")
def _op_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_index: Tensor | None,
    key_logsize: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    blocks: Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    query_slice: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    extras = _extras(key_index, key_logsize, bias, offsets, blocks, query_block, key_block)
    return _attend(q, k, v, extras, scale, query_slice, kernel)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, extras: Extras, scale: float, query_slice: int, kernel: str
) -> tuple[Tensor, Tensor]:
    if kernel == "triton":
        from diffeff.kernels.sliced_attention.triton import sliced_attention_triton

        return sliced_attention_triton(q, k, v, extras, scale)
    return reference(q, k, v, extras, scale, query_slice)


def _laid_out(out: Tensor) -> Tensor:
    """One layout whatever made it, as torch.compile is told: [B, N, H, D] in memory. Most backends write it already."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    b, h, n, _ = q.shape
    return torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)


@_op_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    out = torch.empty(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    return out, torch.empty(b, h, n, dtype=wide, device=q.device)
