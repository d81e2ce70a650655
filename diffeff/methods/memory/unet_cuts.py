"""How finely a UNet is cut: as fine as costs no time on the device, finer where a budget asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.temporal import Slices

__all__ = ["ranges", "skip_bytes", "slices_for"]

_TOKENS = {"cpu": 1024}
_MANY_TOKENS = 16384
"""Tokens of a slice below which matrix products lose speed: measured on a CPU; for accelerators an estimate."""
_SLICE = 4 * 2**20
"""Bytes that a slice of an attention or a feed-forward works on, on a CPU: below, weights are read too often."""
_FEWEST = 32
"""Tokens of the smallest slices that a tight budget leads to: below, next to nothing is gained for much time."""
_WIDE = 1280
"""Channels above which half the tokens keep the convolutions busy."""


def ranges(items: int, count: int) -> list[tuple[int, int]]:
    """`items` in `count` ranges of nearly the same length."""
    bounds = [items * i // count for i in range(count + 1)]
    return list(pairwise(bounds))


def skip_bytes(unet: Any, sample: Tensor) -> int:
    """Bytes of the skip connections that one forward must hold at its deepest point: all that are not recomputed.

    `sample`: the UNet's input; dimensions -2 and -1 are height and width, the others but the channels count rows.
    """
    height, width = sample.shape[-2:]
    rows = sample.numel() // (height * width * unet.config.in_channels)
    total = 0
    for block in unet.down_blocks:
        channels = getattr(block.resnets[-1], "out_channels", None) or _spatial(block.resnets[-1]).out_channels
        total += len(block.resnets) * channels * height * width
        if block.downsamplers:
            height, width = -(-height // 2), -(-width // 2)
    return int(total * rows * sample.element_size())


def _spatial(resnet: Any) -> Any:
    return resnet.spatial_res_block


@dataclass(frozen=True)
class _Cuts:
    share: Share
    tokens: int
    slice: int
    itemsize: int
    held: int

    def rows(self, rows: int, tokens: int, channels: int) -> list[tuple[int, int]]:
        """A residual block holds its input, its norm and a convolution; wide ones are cut finer, narrow ones less."""
        enough = max(self.tokens // 2, self.tokens * _WIDE // max(channels, _WIDE), 2 * self._tokens(channels))
        return self._cut(rows, enough / tokens, _FEWEST / tokens, 4 * tokens * channels)

    def attended(self, rows: int, tokens: int, channels: int) -> list[tuple[int, int]]:
        """An attention holds its input, its norm, query, key, value, output and its projection."""
        return self._cut(rows, self._tokens(channels) / tokens, _FEWEST / tokens, 8 * tokens * channels)

    def pixels(self, pixels: int, frames: int, channels: int) -> list[tuple[int, int]]:
        return self._cut(pixels, self._tokens(channels) / frames, _FEWEST / frames, 8 * frames * channels)

    def parts(self, tokens: int, channels: int) -> list[tuple[int, int]]:
        """A gated feed-forward holds eight times its channels."""
        return self._cut(tokens, self._tokens(channels), _FEWEST, 8 * channels)

    def _tokens(self, channels: int) -> int:
        """Tokens of which eight maps of so many channels fill the bytes of a slice."""
        return max(self.tokens // 4, self.slice // (8 * channels * self.itemsize))

    def _cut(self, items: int, enough: float, fewest: float, numbers: int) -> list[tuple[int, int]]:
        """Slices of `enough` items, of down to `fewest` where the budget asks for them, or as many as were ordered.

        `numbers`: values that an item works on.
        """
        count = self.share.count(items, numbers * self.itemsize, self.held)
        if self.share.slices is None:
            count = min(count, -(-items // max(int(fewest), 1)))
            count = max(count, -(-items // max(int(enough), 1)))
        return ranges(items, min(count, items))


def slices_for(unet: Any, sample: Tensor, share: Share) -> Slices:
    """The cuts of one forward on `sample`."""
    held = 0 if share.activation_bytes is None else skip_bytes(unet, sample)
    tokens = _TOKENS.get(sample.device.type, _MANY_TOKENS)
    cuts = _Cuts(share, tokens, _SLICE * tokens // _TOKENS["cpu"], sample.element_size(), held)
    return Slices(cuts.rows, cuts.attended, cuts.pixels, cuts.parts)
