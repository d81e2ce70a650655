"""What `predict` means, in plain torch: sum_i w_i x_i of snapshots of one shape, accumulated in float32.

Training-free cache predictors (Taylor, Hermite, linear fits) are such sums. Their weights alternate in sign and grow
with the order, so that accumulating in half precision would lose what they extrapolate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(snapshots: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum in the dtype and layout of the first snapshot; one more tensor in float32 while it is made."""
    first = snapshots[0]
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weights[0]
    for snapshot, weight in zip(snapshots[1:], weights[1:], strict=True):
        total.add_(snapshot, alpha=weight)
    return total.to(first.dtype)
