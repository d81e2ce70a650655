"""The module that stands in for an `nn.Linear` whose weight is held in int8, and what is kept to bring it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffeff.kernels.int8_linear import choose_kernel, dequantise, int8_linear, pack, row_bucket

__all__ = ["Original", "QLinear"]


class Original:
    """A replaced layer, kept so that undoing gives back the same module object with the same bits.

    Its weight stays in main memory (`folder=None`: free of copies on a CPU, moved off an accelerator), or goes to a
    file in `folder`. The module, its Parameter objects and its bias stay as they are.
    """

    def __init__(self, module: nn.Linear, folder: Path | None, name: str) -> None:
        self.module = module
        self.device, self.dtype, self.shape = module.weight.device, module.weight.dtype, module.weight.shape
        self.file = None if folder is None else folder / f"{name}.safetensors"

    def stow(self) -> None:
        """Take the weight off the accelerator, or out of memory. Raises OSError when the file cannot be written."""
        weight = self.module.weight
        if self.file is not None:
            save_file({"weight": weight.data.contiguous()}, self.file)
            weight.data = torch.empty(0, dtype=self.dtype)
        elif self.device.type != "cpu":
            weight.data = weight.data.cpu()

    def weight(self, device: torch.device) -> Tensor:
        """The float weight on `device`, brought back for good if it is not there."""
        held = self.module.weight
        if self.file is not None and self.file.exists():
            held.data = load_file(self.file)["weight"]
            self.file.unlink()
        if held.device != device:
            held.data = held.data.to(device)
        return held

    def restore(self, device: torch.device, dtype: torch.dtype) -> nn.Linear:
        """The original module, on the device and in the dtype to which its stand-in was moved in the meantime."""
        self.weight(device)
        return self.module if dtype is self.dtype else self.module.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the float weight."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def kept(self) -> tuple[str, int]:
        """Where the weight waits for the undo (memory or disk), and its bytes."""
        return ("disk" if self.file is not None and self.file.exists() else "memory"), self.nbytes


class QLinear(nn.Module):
    """A linear layer with an int8 weight: `qweight` int8 [out, in] and `weight_scale` float32 [out].

    Forward takes and returns [..., in] -> [..., out] in the dtype of its input. The scales stay float32 under `.to`,
    `.half` and the like. Gradients flow to the input (through the dequantised weight), never to the weight.
    """

    qweight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    _dtype_probe: Tensor

    def __init__(self, original: Original, qweight: Tensor, scale: Tensor, among: tuple[str, ...]) -> None:
        super().__init__()
        source = original.module
        self.in_features, self.out_features = source.in_features, source.out_features
        self.register_buffer("qweight", qweight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("_dtype_probe", torch.empty(0, dtype=original.dtype, device=qweight.device), False)
        bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.among = among
        """The kernels it may use, the preferred one first; `float` stands for the original weight."""
        self.choices: dict[tuple[int, torch.dtype], str] = {}
        """The kernel in use by (row bucket, dtype)."""
        self._original = (original,)  # in a tuple: not a submodule, so absent from state_dict and `.to`
        self._packed: dict[str, Any] = {}
        self.train(source.training)

    @property
    def original(self) -> Original:
        """What brings the float layer back."""
        return self._original[0]

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype this layer stands for."""
        return self._dtype_probe.dtype

    @property
    def weight(self) -> Tensor:
        """The weight this layer multiplies with, dequantised anew at each access: for code that reads its dtype, device
        or shape, or fuses projections."""
        return dequantise(self.qweight, self.weight_scale, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the int8 weight, its scales and the copy that `aten_dynamic` makes of them."""
        return (self.qweight.nbytes + self.weight_scale.nbytes) * (1 + len(self._packed))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's own name: diffusers passes it by keyword)
        x = input
        kernel = self._kernel(x)
        if kernel == "float":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.original.weight(x.device).to(x.dtype), bias)
        packed = self._packed.get(kernel)
        if packed is None and kernel == "aten_dynamic":
            packed = self._packed[kernel] = pack(kernel, self.qweight, self.weight_scale, self.bias)
        return int8_linear(x, self.qweight, self.weight_scale, self.bias, kernel=kernel, packed=packed)

    def _kernel(self, x: Tensor) -> str:
        if torch.is_grad_enabled() and x.requires_grad:
            return "dequantise"
        rows = x.numel() // self.in_features
        key = (row_bucket(rows, x.device), x.dtype)
        if key not in self.choices:
            self.choices[key] = choose_kernel(rows, self.in_features, self.out_features, x.dtype, x.device, self.among)
        return self.choices[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype is not torch.float32:  # cast along with the model: back to the unrounded values
            self.weight_scale = scale.to(self.weight_scale.device)
        self._packed.clear()
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, int8"
