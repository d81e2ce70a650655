"""Scratch memory inside operators, which no trace of tensors sees, by stated rules per device and backend.

CPU: a oneDNN convolution works on blocked copies of its input and output, which live while it runs. Small float32 ones
are torch's own, which unfold their input: every value once per tap of the kernel. Attention: the flash kernel keeps one
tile per thread; the math form's score matrix is a tensor, and so is seen by the trace.
CUDA: a cuDNN convolution may take as much as its input for its algorithm. Matrix products take none that matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MARGIN", "scratch_bytes"]

MARGIN: dict[str, float] = {"cuda": 1.03, "mps": 1.05, "cpu": 1.02}
"""What an allocator holds over what was asked for: rounding and fragments, as a factor on activations."""
_CONVOLUTIONS = ("aten::convolution", "aten::_convolution")
_TILE_ROWS, _TILE_COLUMNS = 256, 512
"""Largest tile of the CPU flash kernel: queries, keys."""


def scratch_bytes(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Bytes an operator holds while it runs, beyond its inputs and outputs. `name`: such as aten::convolution."""
    if not outputs:
        return 0
    device = outputs[0].device.type
    if name in _CONVOLUTIONS:
        return _convolution(device, args, outputs[0])
    if device == "cpu" and name.startswith("aten::_scaled_dot_product_flash"):
        return _flash_tiles(args[0])
    return 0


def _convolution(device: str, args: Sequence[Any], out: Tensor) -> int:
    x, taps = args[0], math.prod(args[1].shape[2:])
    if device != "cpu":
        return int(x.nbytes)
    if _by_onednn(args):
        return int(x.nbytes + out.nbytes)
    return 0 if taps == 1 else x.shape[0] * x.shape[1] * taps * math.prod(out.shape[2:]) * x.element_size()


def _by_onednn(args: Sequence[Any]) -> bool:
    """Whether torch hands a CPU convolution to oneDNN. Arguments as those of aten::convolution; the rule is that of
    `use_mkldnn` in aten/src/ATen/native/Convolution.cpp (torch 2.13)."""
    x, weight = args[0], args[1]
    stride, dilation, groups = args[3], args[5], args[8]
    if x.dtype is not torch.float32:
        return x.dtype in (torch.bfloat16, torch.float16)
    stepping = any(s != 1 for s in (*stride, *dilation)) or x.shape[0] >= 16
    single = weight.shape[-1] == weight.shape[-2] == 1 and torch.get_num_threads() == 1 and not stepping
    wide = weight.shape[-1] > 3 and weight.shape[-2] > 3
    large = groups > 1 or wide or x.shape[0] > 1 or math.prod(x.shape[:4]) > 20480
    return bool(large and not single)


def _flash_tiles(q: Tensor) -> int:
    tile = _TILE_ROWS * (_TILE_COLUMNS + q.shape[-1]) * 4
    return torch.get_num_threads() * tile
