"""Scratch memory inside operators, which no trace of tensors sees, by stated rules per device and backend.

CPU: a oneDNN convolution works on blocked copies of its input and output, which live while it runs. Attention: the
flash kernel keeps one tile per thread; the math form's score matrix is a tensor, and so is seen by the trace.
CUDA: a cuDNN convolution may take as much as its input for its algorithm. Matrix products take none that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MARGIN", "scratch_bytes"]

MARGIN: dict[str, float] = {"cuda": 1.03, "mps": 1.05, "cpu": 1.02}
"""What an allocator holds over what was asked for: rounding and fragments, as a factor on activations."""
_CONVOLUTIONS = ("aten::convolution", "aten::_convolution", "aten::mkldnn_convolution")
_TILE_ROWS, _TILE_COLUMNS = 256, 512
"""Largest tile of the CPU flash kernel: queries, keys."""


def scratch_bytes(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Bytes an operator holds while it runs, beyond its inputs and outputs. `name`: such as aten::convolution."""
    if not outputs:
        return 0
    device = outputs[0].device.type
    if name in _CONVOLUTIONS:
        return _convolution(device, args[0], outputs[0])
    if device == "cpu" and name.startswith("aten::_scaled_dot_product_flash"):
        return _flash_tiles(args[0])
    return 0


def _convolution(device: str, x: Tensor, out: Tensor) -> int:
    return x.nbytes + out.nbytes if device == "cpu" else x.nbytes


def _flash_tiles(q: Tensor) -> int:
    tile = _TILE_ROWS * (_TILE_COLUMNS + q.shape[-1]) * 4
    return torch.get_num_threads() * tile
