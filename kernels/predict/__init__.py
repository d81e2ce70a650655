"""A weighted sum of cached snapshots: reference, Triton kernel, and the rule between them."""

from __future__ import annotations

from diffeff.kernels.predict.dispatch import predict
from diffeff.kernels.predict.reference import reference

__all__ = ["predict", "reference"]
