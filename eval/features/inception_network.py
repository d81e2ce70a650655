"""The network behind FID, as a table: Inception-v3 the way the TensorFlow graph of 2015-12-05 has it.

It is not torchvision's. Average pools leave the padding out and the last pool is a max pool (Szegedy et al. 2016;
Heusel et al. 2017, who made it the yardstick).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DIM", "SIDE", "FidInception"]

DIM = 2048
SIDE = 299


@dataclass(frozen=True)
class _Conv:
    """Convolution, batch norm, ReLU. Padded to keep the size where `same`."""

    name: str
    width: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True


def _conv(name: str, width: int, kernel: int | tuple[int, int] = 1) -> _Conv:
    return _Conv(name, width, kernel if isinstance(kernel, tuple) else (kernel, kernel))


def _valid(name: str, width: int, stride: int = 1) -> _Conv:
    return _Conv(name, width, (3, 3), stride, same=False)


_Step = str | _Conv | tuple[_Conv, _Conv]
"""One step of a branch: the name of a pool, a convolution, or two of them side by side."""
_Branches = tuple[tuple[_Step, ...], ...]

_POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "down": lambda x: F.max_pool2d(x, 3, 2),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
}

_ROW, _COLUMN = (1, 7), (7, 1)


def _block_a(pooled: int) -> _Branches:
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)),
        ("avg", _conv("branch_pool", pooled)),
    )


def _block_c(inner: int) -> _Branches:
    across, down = "branch7x7_", "branch7x7dbl_"
    return (
        (_conv("branch1x1", 192),),
        (_conv(across + "1", inner), _conv(across + "2", inner, _ROW), _conv(across + "3", 192, _COLUMN)),
        (
            _conv(down + "1", inner),
            _conv(down + "2", inner, _COLUMN),
            _conv(down + "3", inner, _ROW),
            _conv(down + "4", inner, _COLUMN),
            _conv(down + "5", 192, _ROW),
        ),
        ("avg", _conv("branch_pool", 192)),
    )


def _block_e(pool: str) -> _Branches:
    def fork(name: str, letters: str) -> tuple[_Conv, _Conv]:
        return _conv(name + letters[0], 384, (1, 3)), _conv(name + letters[1], 384, (3, 1))

    return (
        (_conv("branch1x1", 320),),
        (_conv("branch3x3_1", 384), fork("branch3x3_2", "ab")),
        (_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3", "ab")),
        (pool, _conv("branch_pool", 192)),
    )


_BLOCK_B: _Branches = (
    (_valid("branch3x3", 384, 2),),
    (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _valid("branch3x3dbl_3", 96, 2)),
    ("down",),
)
_BLOCK_D: _Branches = (
    (_conv("branch3x3_1", 192), _valid("branch3x3_2", 320, 2)),
    (
        _conv("branch7x7x3_1", 192),
        _conv("branch7x7x3_2", 192, _ROW),
        _conv("branch7x7x3_3", 192, _COLUMN),
        _valid("branch7x7x3_4", 192, 2),
    ),
    ("down",),
)

_STEM: tuple[_Step, ...] = (
    _valid("Conv2d_1a_3x3", 32, 2),
    _valid("Conv2d_2a_3x3", 32),
    _conv("Conv2d_2b_3x3", 64, 3),
    "down",
    _conv("Conv2d_3b_1x1", 80),
    _valid("Conv2d_4a_3x3", 192),
    "down",
)
_MIXED: Mapping[str, _Branches] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("avg"),
    "Mixed_7c": _block_e("max"),  # the original graph's own oddity, kept because every published FID has it
}

_SHOWN = frozenset({"Mixed_5d", "Mixed_6e", "Mixed_7c"})
"""The last block before each change of resolution, and the end."""


class _ConvNorm(nn.Module):
    def __init__(self, channels: int, step: _Conv) -> None:
        super().__init__()
        padding = (step.kernel[0] // 2, step.kernel[1] // 2) if step.same else (0, 0)
        self.conv = nn.Conv2d(channels, step.width, step.kernel, step.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(step.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Branched(nn.Module):
    """Branches beside each other, their outputs stacked along the channels. A stem is one branch."""

    def __init__(self, channels: int, branches: _Branches) -> None:
        super().__init__()
        self._branches = branches
        self.width = sum(self._grow(channels, branch) for branch in branches)

    def _grow(self, width: int, branch: tuple[_Step, ...]) -> int:
        for step in branch:
            convs = (step,) if isinstance(step, _Conv) else () if isinstance(step, str) else step
            for conv in convs:
                self.add_module(conv.name, _ConvNorm(width, conv))
            width = sum(conv.width for conv in convs) or width
        return width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(x, branch) for branch in self._branches], 1)

    def _along(self, x: Tensor, branch: tuple[_Step, ...]) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, _Conv):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], 1)
        return x


class FidInception(_Branched):
    """The network up to its pooled features, built from the table above.

    Parameter names are those of pytorch-fid and torch-fidelity, so their weights load by name.
    """

    def __init__(self) -> None:
        super().__init__(3, (_STEM,))
        for name, branches in _MIXED.items():
            block = _Branched(self.width, branches)
            self.add_module(name, block)
            self.width = block.width

    def forward(self, x: Tensor) -> Tensor:
        """Prepared images [N, 3, 299, 299] in [-1, 1) to features [N, 2048]."""
        return self.maps(x)[-1].mean((2, 3))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Of the same: feature maps of 192, 288, 768 and 2,048 channels, with sides of 35, 35, 17 and 8."""
        x = super().forward(x)
        found = [x]
        for name in _MIXED:
            x = self.get_submodule(name)(x)
            if name in _SHOWN:
                found.append(x)
        return found
