"""Convolutions, residual blocks and heads of image autoencoders on strips of rows, exactly.

A 3x3 convolution needs one row above and below its strip; a group norm needs the statistics of the whole picture, which
are read strip by strip before. So a residual block holds its input and one other map whole, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit_engine import spans
from diffeff.methods.memory.norm import Affine, group_affine
from diffeff.methods.memory.resnet import activate, add

__all__ = ["Noted", "convolving", "downsample", "noting", "resnet", "upsample"]

Rows = slice
_ROWS = 32
"""Rows of a strip without a budget: its two extra rows cost 6 % of a convolution, less than the caches gain."""


def strips(x: Tensor, share: Share, channels: int, whole: int) -> list[Rows]:
    """The strips of rows of a map [batch, channels, rows, columns] of which one item is worked on at a time.

    `channels`: of all that a row holds in passing; `whole`: of the maps that are held whole.
    """
    batch, _, rows, columns = x.shape
    if share.slices is None and share.activation_bytes is None:
        return spans(rows, max(rows // _ROWS, 1))
    row = columns * x.element_size()
    return spans(rows, share.count(rows, row * channels, batch * rows * row * whole))


def _halo(rows: Rows, height: int) -> tuple[Rows, int]:
    """The strip with one more row on each side where there is one, and how many it begins with."""
    start = max(rows.start - 1, 0)
    return slice(start, min(rows.stop + 1, height)), rows.start - start


def _affine(norm: nn.GroupNorm, item: Tensor, cuts: list[Rows]) -> Affine:
    """Statistics of one item [channels, rows, columns]: its rows take the place of frames."""
    return group_affine(item.transpose(0, 1), norm, 1, [(c.start, c.stop) for c in cuts])


def _normed(affine: Affine, part: Tensor) -> Tensor:
    return affine.apply(part.flatten(2), 0).view(part.shape)


def _conv(conv: Callable[[Tensor], Tensor], part: Tensor, skip: int, rows: int) -> Tensor:
    """Rows `skip` to `skip + rows` of the convolution of a strip: its own zeros beyond the strip reach only the
    others, and the border of the picture."""
    return conv(part)[:, :, skip : skip + rows]


# --- residual blocks ------------------------------------------------------------------------------------------------
def resnet(block: Any, x: Tensor, share: Share) -> Tensor:
    """ResnetBlock2D without time embedding: [batch, channels, rows, columns] in and out."""
    width, out = x.shape[1], block.conv1.out_channels
    cuts = strips(x, share, 2 * max(width, out) + out, width + out)
    h = x.new_empty((x.shape[0], out, *x.shape[2:]))
    for item in range(x.shape[0]):
        one = slice(item, item + 1)
        _first_half(block, x[one], h[one], cuts)
        _second_half(block, x[one], h[one], cuts)
    return h


def _first_half(block: Any, x: Tensor, h: Tensor, cuts: list[Rows]) -> None:
    affine = _affine(block.norm1, x[0], cuts)
    for rows in cuts:
        around, skip = _halo(rows, x.shape[2])
        part = activate(block.nonlinearity, _normed(affine, x[:, :, around]))
        h[:, :, rows] = _conv(block.conv1, part, skip, rows.stop - rows.start)


def _second_half(block: Any, x: Tensor, h: Tensor, cuts: list[Rows]) -> None:
    """Overwrites `h` by the result; the row that the next strip still needs is kept beside it."""
    affine, edge = _affine(block.norm2, h[0], cuts), h[:, :, :0]
    for rows in cuts:
        around, skip = _halo(rows, h.shape[2])
        part = torch.cat([edge, h[:, :, rows.start : around.stop]], dim=2)
        edge = h[:, :, rows.stop - 1 : rows.stop].clone()
        part = block.dropout(activate(block.nonlinearity, _normed(affine, part)))
        y = _conv(block.conv2, part, skip, rows.stop - rows.start)
        shortcut = x[:, :, rows] if block.conv_shortcut is None else block.conv_shortcut(x[:, :, rows])
        y = add(y, shortcut)
        h[:, :, rows] = y if block.output_scale_factor == 1 else y / block.output_scale_factor


# --- sampling -------------------------------------------------------------------------------------------------------
def upsample(plain: Callable[[Tensor], Tensor], x: Tensor, share: Share) -> Tensor:
    """Nearest-neighbour doubling and its 3x3 convolution."""
    cuts = strips(x, share, 9 * x.shape[1], 5 * x.shape[1])
    out: Tensor | None = None
    for rows in cuts:
        around, skip = _halo(rows, x.shape[2])
        part = _conv(plain, x[:, :, around], 2 * skip, 2 * (rows.stop - rows.start))
        if out is None:
            out = x.new_empty((x.shape[0], part.shape[1], 2 * x.shape[2], 2 * x.shape[3]))
        out[:, :, 2 * rows.start : 2 * rows.stop] = part
    return plain(x) if out is None else out


def downsample(plain: Callable[[Tensor], Tensor], x: Tensor, share: Share) -> Tensor:
    """A 3x3 convolution with stride 2 over a map padded by one row and column at its end."""
    height = (x.shape[2] - 2) // 2 + 1
    cuts = strips(x[:, :, :height], share, 4 * x.shape[1], 2 * x.shape[1])
    out: Tensor | None = None
    for rows in cuts:
        part = plain(x[:, :, 2 * rows.start : 2 * rows.stop + 2])[:, :, : rows.stop - rows.start]
        if out is None:
            out = x.new_empty((*part.shape[:2], height, part.shape[3]))
        out[:, :, rows] = part
    return plain(x) if out is None else out


# --- heads ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Noted:
    """A map, and the norm and activation that wait for the last convolution to be carried out."""

    x: Tensor
    norm: nn.GroupNorm
    activation: nn.Module | None = None


def noting(norm: nn.GroupNorm) -> Callable[[Tensor], Any]:
    """A forward for the norm of the head; plain under a compiler, which cannot follow the note."""
    plain = norm.forward
    return lambda x: plain(x) if torch.compiler.is_compiling() else Noted(x, norm)


def convolving(plain: Callable[[Tensor], Tensor], share: Share) -> Callable[[Any], Tensor]:
    """A forward for the last convolution: norm, activation and itself, strip by strip."""

    def forward(noted: Any) -> Tensor:
        if not isinstance(noted, Noted):
            return plain(noted)
        if torch.is_grad_enabled() and noted.x.requires_grad:
            normed = type(noted.norm).forward(noted.norm, noted.x)
            return plain(
                normed if noted.activation is None else type(noted.activation).forward(noted.activation, normed)
            )
        parts = list(_head(plain, noted, share))
        return torch.cat([torch.cat(item, dim=2) for item in parts])

    return forward


def _head(plain: Callable[[Tensor], Tensor], noted: Noted, share: Share) -> Iterator[list[Tensor]]:
    """The strips of each item; a handful of channels, so joining them costs nothing."""
    x = noted.x
    cuts = strips(x, share, 3 * x.shape[1], x.shape[1])
    for item in x.split(1):
        affine = _affine(noted.norm, item[0], cuts)
        yield [_head_strip(plain, noted, affine, item, rows) for rows in cuts]


def _head_strip(plain: Callable[[Tensor], Tensor], noted: Noted, affine: Affine, item: Tensor, rows: Rows) -> Tensor:
    around, skip = _halo(rows, item.shape[2])
    part = _normed(affine, item[:, :, around])
    part = part if noted.activation is None else activate(noted.activation, part)
    return _conv(plain, part, skip, rows.stop - rows.start)
