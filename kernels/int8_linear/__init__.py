"""A linear layer with int8 weights: reference, CPU and CUDA kernels, and a measured choice among them."""

from __future__ import annotations

from diffeff.kernels.int8_linear.dispatch import (
    KERNELS,
    choose_kernel,
    int8_linear,
    kernels_on,
    measure,
    pack,
    quantise_weight,
    row_bucket,
)
from diffeff.kernels.int8_linear.reference import dequantise, quantise_rows, reference

__all__ = [
    "KERNELS",
    "choose_kernel",
    "dequantise",
    "int8_linear",
    "kernels_on",
    "measure",
    "pack",
    "quantise_rows",
    "quantise_weight",
    "reference",
    "row_bucket",
]
