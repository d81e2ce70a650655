"""`group_norm_two_pass` in two kernels: many programs per group take partial statistics, then all normalise.

One program per group, as the usual kernel has it, leaves most of a GPU idle (a batch of 2 has 64 groups). The partial
means and squared deviations are joined in between by a few tiny torch operations, without cancellation.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffeff.kernels.targets import on_device

__all__ = ["Layout", "group_norm_triton", "layout_of"]

_BLOCK = 1024
_STEPS = 8
"""Blocks that one program of the first pass adds up."""


@dataclass(frozen=True)
class Layout:
    """A feature map as [rows, channels, positions] by strides, positions collapsed."""

    rows: int
    channels: int
    positions: int
    row: int
    channel: int
    position: int

    @property
    def channels_last(self) -> bool:
        return self.channel < self.position


def layout_of(x: Tensor) -> Layout | None:
    """The layout of [rows, channels, ...]; None where the trailing dimensions are not evenly spaced."""
    positions, step = 1, 0
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if positions == 1:
            step = stride
        elif stride != step * positions:
            return None
        positions *= size
    return Layout(x.shape[0], x.shape[1], positions, x.stride(0), x.stride(1), step or 1)


@triton.jit
def _offsets(at, per, positions, channel, position, LAST: tl.constexpr):
    """Memory offset and channel of the numbers `at` of one group, in the order in which they lie in memory."""
    if LAST:
        c, s = at % per, at // per
    else:
        c, s = at // positions, at % positions
    return c * channel + s * position, c


@triton.jit
def _partial(
    x, mean, m2, groups, per, positions, row, channel, position, chunks,
    LAST: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, which = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    base = x + which // groups * row + which % groups * per * channel
    size = per.to(tl.int64) * positions
    first = chunk.to(tl.int64) * STEPS * BLOCK
    # shifted by the first number, so that one pass does not cancel
    shift = tl.load(base + _offsets(first, per, positions, channel, position, LAST)[0]).to(tl.float32)
    sums, squares = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        offset, _ = _offsets(at, per, positions, channel, position, LAST)
        value = tl.load(base + offset, mask=at < size, other=0.0).to(tl.float32)
        value = tl.where(at < size, value - shift, 0.0)
        sums += value
        squares += value * value
    count = tl.minimum(size - first, STEPS * BLOCK).to(tl.float32)
    total = tl.sum(sums, axis=0)
    tl.store(mean + tl.program_id(0), shift + total / count)
    tl.store(m2 + tl.program_id(0), tl.sum(squares, axis=0) - total * total / count)


@triton.jit
def _normalise(
    x, out, mean, rstd, weight, bias, groups, per, positions, row, channel, position, orow, ochannel, oposition,
    chunks, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, which = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    group = which % groups
    at = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < per.to(tl.int64) * positions
    offset, c = _offsets(at, per, positions, channel, position, LAST)
    value = tl.load(x + which // groups * row + group * per * channel + offset, mask=inside, other=0.0)
    result = (value.to(tl.float32) - tl.load(mean + which)) * tl.load(rstd + which)
    if HAS_WEIGHT:
        result *= tl.load(weight + group * per + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + group * per + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    offset, _ = _offsets(at, per, positions, ochannel, oposition, LAST)
    place = out + which // groups * orow + group * per * ochannel + offset
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


def group_norm_triton(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, frames: int
) -> Tensor:
    """The normalised map in the layout of `x`; a map whose positions are not evenly spaced is copied first."""
    if layout_of(x) is None:
        x = x.contiguous()
    out = torch.empty_like(x)
    source, target = layout_of(x), layout_of(out)
    if source is None or target is None or not x.numel():
        return out
    with on_device(x.device):
        mean, rstd = _statistics(x, source, groups, frames, eps)
        _second_pass(x, out, (source, target), (mean, rstd), (weight, bias), silu)
    return out


def _statistics(x: Tensor, place: Layout, groups: int, frames: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation, float32 [rows, groups], over `frames` consecutive rows together."""
    per = place.channels // groups
    size, chunk = per * place.positions, _STEPS * _BLOCK
    chunks = triton.cdiv(size, chunk)
    mean, m2 = torch.empty(2, place.rows, groups, chunks, device=x.device).unbind(0)
    _partial[(mean.numel(),)](
        x, mean, m2, groups, per, place.positions, place.row, place.channel, place.position, chunks,
        LAST=place.channels_last, STEPS=_STEPS, BLOCK=_BLOCK,
    )  # fmt: skip
    count = torch.full((chunks,), float(chunk), device=x.device)
    count[-1] = size - (chunks - 1) * chunk
    mean, m2 = (t.view(-1, frames, groups, chunks) for t in (mean, m2))
    whole = (mean * (count / (size * frames))).sum((1, 3), keepdim=True)
    variance = (m2 + (mean - whole).square() * count).sum((1, 3), keepdim=True) / (size * frames)
    shape = (place.rows // frames, frames, groups, 1)
    rstd = (variance + eps).rsqrt()
    return whole.expand(shape).contiguous(), rstd.expand(shape).contiguous()


def _second_pass(
    x: Tensor,
    out: Tensor,
    places: tuple[Layout, Layout],
    stats: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
    silu: bool,
) -> None:
    source, target = places
    groups = stats[0].shape[2]
    per = source.channels // groups
    chunks = triton.cdiv(per * source.positions, _BLOCK)
    weight, bias = affine
    _normalise[(source.rows * groups * chunks,)](
        x, out, *stats, x if weight is None else weight, x if bias is None else bias, groups, per, source.positions,
        source.row, source.channel, source.position, target.row, target.channel, target.position, chunks,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SILU=silu, LAST=source.channels_last, BLOCK=_BLOCK,
    )  # fmt: skip
