"""Residual blocks of UNets on a slice: spatial ones on some rows, temporal ones on some pixels of all frames."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = ["activate", "add", "add_vector", "bare", "resnet_rows"]


def bare(module: Any) -> Any:
    """The module inside diffusers' wrapper for split inference, whose work our slices do."""
    return module.module if type(module).__name__ == "SplitInferenceModule" else module


def activate(module: nn.Module, x: Tensor) -> Tensor:
    """The activation, in place where it is SiLU; `x` must belong to the caller."""
    result: Tensor = F.silu(x, inplace=True) if type(module) is nn.SiLU else module(x)
    return result


def add(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, into `x` where that keeps shape and dtype; `x` must belong to the caller."""
    return x.add_(y) if x.dtype is y.dtype and x.shape == y.shape else x + y


def resnet_rows(resnet: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """One spatial residual block on some rows: [rows, channels, height, width] in, a new tensor out.

    Rows are independent of each other here, group norms included, so this is exact. Blocks that resample or modulate
    run by their own forward.
    """
    if not _plain(resnet):
        result: Tensor = resnet(x, temb)
        return result
    h = resnet.conv1(activate(resnet.nonlinearity, resnet.norm1(x)))
    if resnet.time_emb_proj is not None and temb is not None:
        temb = temb if resnet.skip_time_act else resnet.nonlinearity(temb)
        h = add_vector(h, resnet.time_emb_proj(temb)[:, :, None, None])
    h = resnet.conv2(resnet.dropout(activate(resnet.nonlinearity, resnet.norm2(h))))
    h = add(h, x if resnet.conv_shortcut is None else resnet.conv_shortcut(x))
    return h if resnet.output_scale_factor == 1 else h.div_(resnet.output_scale_factor)


def add_vector(h: Tensor, vector: Tensor) -> Tensor:
    """`h + vector` into `h`; the vector is broadcast."""
    return h.add_(vector) if h.dtype is vector.dtype else h + vector


def _plain(resnet: Any) -> bool:
    return (
        type(resnet) is ResnetBlock2D
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.time_embedding_norm == "default"
    )
