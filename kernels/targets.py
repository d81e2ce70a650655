"""Where Triton kernels run, which kernel a call gets, and who listens to torch's own attention."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["dense_like", "interpreting", "listeners", "on_device", "pick", "runs_triton", "triton_installed"]


@cache
def triton_installed() -> bool:
    """Whether triton can be imported; nothing is imported to find out."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether TRITON_INTERPRET is set: kernels then run on the CPU, slowly. Triton reads it when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def runs_triton(device: torch.device) -> bool:
    """Whether a Triton kernel can run on a device."""
    return triton_installed() and (device.type == "cuda" or interpreting())


def pick(op: str, kernel: str, device: torch.device, auto: str) -> str:
    """The kernel that a call of `op` gets: `auto` names the one its rule prefers, which must be able to run.

    Raises ValueError for an unknown name, RuntimeError when Triton was asked for and cannot run on the device.
    """
    if kernel == "auto":
        return auto
    if kernel not in ("triton", "sdpa", "reference"):
        raise ValueError(f"{op} has no kernel {kernel!r}; known: auto, triton, sdpa, reference")
    if kernel == "triton" and not runs_triton(device):
        raise RuntimeError(
            f"{op} kernel 'triton' cannot run on {device}: it needs triton and a CUDA device, or TRITON_INTERPRET=1 "
            "set before the first import of triton. kernel='auto' takes what runs."
        )
    return kernel


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the operands."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def listeners() -> list[TorchFunctionMode]:
    """The torch-function modes in force that may listen to scaled_dot_product_attention.

    Perturbed-attention guidance and our own attention seam act by intercepting that one function. Whoever stands in
    for it must hand the whole call over while one of them listens. A default device is no listener.
    """
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]


def dense_like(x: Tensor) -> Tensor:
    """An empty tensor of the shape of x whose dimensions lie in memory in the order of x's, the last one innermost.

    The same order for views (slices of a fused projection, permuted maps), which `empty_like` does not promise.
    """
    strides = x.stride()
    order = sorted(range(x.ndim - 1), key=strides.__getitem__, reverse=True)
    out = x.new_empty([*(x.shape[axis] for axis in order), x.shape[-1]])
    return out.permute([*(order.index(axis) for axis in range(x.ndim - 1)), x.ndim - 1])
