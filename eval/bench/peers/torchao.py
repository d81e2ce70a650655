"""torchao: int8 weights, with float or with dynamic int8 activations. It changes the weights in place."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from diffeff.eval.bench.peers import Request, Undo

__all__ = ["int8_dynamic", "int8_weights"]


def int8_weights(request: Request) -> Undo:
    """`quantize_(denoiser, Int8WeightOnlyConfig())`."""
    return _quantise(request, "Int8WeightOnlyConfig")


def int8_dynamic(request: Request) -> Undo:
    """`quantize_(denoiser, Int8DynamicActivationInt8WeightConfig())`."""
    return _quantise(request, "Int8DynamicActivationInt8WeightConfig")


def _quantise(request: Request, config: str) -> Undo:
    torchao: Any = import_module("torchao.quantization")
    linears = [module for module in request.denoiser.modules() if isinstance(module, nn.Linear)]
    weights = [module.weight for module in linears]
    torchao.quantize_(request.denoiser, getattr(torchao, config)())

    def undo() -> None:
        for module, weight in zip(linears, weights, strict=True):
            module.weight = weight
            vars(module).pop("extra_repr", None)

    return undo
