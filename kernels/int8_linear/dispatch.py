"""`int8_linear`: one call for all kernels, and the micro-benchmark that chooses among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.kernels.int8_linear.cpu import aten_dynamic, aten_engine, int_mm, pack_aten
from diffeff.kernels.int8_linear.reference import dequantise, quantise_rows, reference, weight_only
from diffeff.kernels.microbench import timings

__all__ = ["KERNELS", "choose_kernel", "int8_linear", "kernels_on", "measure", "pack", "quantise_weight", "row_bucket"]

KERNELS = ("int_mm", "triton", "aten_dynamic", "dequantise", "reference")
"""All kernels by name. `dequantise` keeps activations in float (weight-only); the others quantise them per call."""
_CAP = {"cpu": 256}
_CAP_DEFAULT = 4096


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and float32 scales [N] of a weight [N, K], one symmetric scale per output channel."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"int8_linear quantises float matrices [N, K], not {tuple(weight.shape)} {weight.dtype}")
    qweight, scale = quantise_rows(weight.detach())
    return qweight, scale[:, 0].contiguous()


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def kernels_on(device: torch.device) -> tuple[str, ...]:
    """The kernels that can run on a device, the preferred default first."""
    names = {"dequantise"}
    if device.type in ("cpu", "cuda"):
        names |= {"int_mm", "reference"}
    if device.type == "cpu" and aten_engine() is not None:
        names.add("aten_dynamic")
    if device.type == "cuda" and _triton_installed():
        names.add("triton")
    return tuple(name for name in KERNELS if name in names)


def pack(kernel: str, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """What `kernel` wants prepared once per weight (pass it to `int8_linear`); None for most."""
    return pack_aten(qweight, scale, bias) if kernel == "aten_dynamic" else None


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, *, kernel: str = "int_mm", packed: Any = None
) -> Tensor:
    """A linear layer whose weight takes a quarter of float32: y = x W^T + b with an int8 weight.

    `x`: float [..., K]; `qweight`: int8 [N, K]; `scale`: float32 [N]; `bias`: [N]. Returns [..., N] in the dtype of x.
    Integer kernels give no gradient; `dequantise` is differentiable in x. Sums stay within int32 up to K = 133,000.
    Raises ValueError for an unknown kernel, RuntimeError for one that cannot run on the device of `x`.
    """
    run = _kernel(kernel, x.device)
    rows = x.reshape(-1, x.shape[-1])
    y = run(rows, qweight, scale, bias, pack(kernel, qweight, scale, bias) if packed is None else packed)
    return y.reshape(*x.shape[:-1], len(qweight))


def _kernel(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Any], Tensor]:
    if name not in KERNELS:
        raise ValueError(f"int8_linear has no kernel {name!r}; known: {', '.join(KERNELS)}")
    if name == "triton":
        return _triton
    if name not in kernels_on(device):
        raise RuntimeError(
            f"int8_linear kernel {name!r} cannot run on {device}; there: {', '.join(kernels_on(device))}"
        )
    plain = {"int_mm": int_mm, "dequantise": weight_only, "reference": reference}
    if name == "aten_dynamic":
        return lambda x, qweight, scale, bias, packed: aten_dynamic(x, packed)
    return lambda x, qweight, scale, bias, packed: plain[name](x, qweight, scale, bias)


def _triton(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, packed: Any) -> Tensor:
    from diffeff.kernels.int8_linear.triton import int8_linear_triton

    return int8_linear_triton(x, qweight, scale, bias)


# --- choosing -------------------------------------------------------------------------------------------------------
def row_bucket(rows: int, device: torch.device) -> int:
    """The number of rows at which a call of `rows` rows is measured: the next power of two, up to where speed per row
    no longer changes."""
    cap = _CAP.get(device.type, _CAP_DEFAULT)
    return min(cap, 1 << max(0, math.ceil(math.log2(max(rows, 1)))))


def measure(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, among: Iterable[str]
) -> dict[str, float]:
    """Seconds per call of the named kernels, and of `float`: the plain linear layer in `dtype`.

    Measured once per (row bucket, shape, dtype, machine) on random data, which never touches the global random state.
    """
    m, names = row_bucket(rows, device), tuple(among)
    key = f"{m}x{in_features}x{out_features} {str(dtype).removeprefix('torch.')}"
    trial = _Trial(m, in_features, out_features, dtype, device)
    return timings("int8_linear", key, device, {name: partial(trial, name) for name in ("float", *names)})


def choose_kernel(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    among: Iterable[str] = ("int_mm", "triton", "dequantise", "float"),
) -> str:
    """The fastest of the named kernels for a layer, by micro-benchmark; `float` is the plain linear layer.

    Names that cannot run on the device are passed over; raises RuntimeError when none is left. Inside torch.compile or
    a CUDA graph capture nothing can be measured: the first name is taken.
    """
    usable = [name for name in among if name == "float" or name in kernels_on(device)]
    if not usable:
        raise RuntimeError(f"int8_linear: none of {tuple(among)} can run on {device}; there: {kernels_on(device)}")
    if len(usable) == 1 or _blind(device):
        return usable[0]
    seconds = measure(rows, in_features, out_features, dtype, device, [n for n in usable if n != "float"])
    return min(usable, key=lambda name: seconds[name])


def _blind(device: torch.device) -> bool:
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


class _Trial:
    """Operands of one micro-benchmark, made when the first candidate runs (a remembered timing needs none)."""

    def __init__(self, rows: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = (rows, k, n), dtype, device
        self.packed: dict[str, Any] = {}

    def __call__(self, name: str) -> Tensor:
        x, weight, qweight, scale, bias = self._operands()
        with torch.no_grad():
            if name == "float":
                return F.linear(x, weight, bias)
            if name not in self.packed:
                self.packed[name] = pack(name, qweight, scale, bias)
            return int8_linear(x, qweight, scale, bias, kernel=name, packed=self.packed[name])

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if not hasattr(self, "_made"):
            rows, k, n = self.shape
            generator = torch.Generator(self.device).manual_seed(0)  # the user's noise must not depend on us
            x = torch.randn(rows, k, generator=generator, device=self.device).to(self.dtype)
            qweight = torch.randint(-127, 128, (n, k), generator=generator, device=self.device, dtype=torch.int8)
            scale = torch.full((n,), 1e-3, device=self.device)
            bias = torch.zeros(n, device=self.device, dtype=self.dtype)
            self._made = (x, dequantise(qweight, scale, self.dtype), qweight, scale, bias)
        return self._made
