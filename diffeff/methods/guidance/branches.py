"""A call that carries both branches of guidance, taken apart: its halves, and the conditional one computed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffeff.core.run import StepCall

__all__ = ["Rows", "conditional_alone", "halves"]

Rows = tuple[Tensor, Tensor]
"""Unconditional and conditional row indices of a batched call, as `Run.guidance_rows` gives them."""


def halves(both: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The unconditional and the conditional rows of a prediction."""
    uncond, cond = (both.index_select(0, r.to(both.device)) for r in rows)
    return uncond, cond


def conditional_alone(
    call: StepCall, rows: Rows, proceed: Callable[[StepCall], Tensor], stand_in: Callable[[Tensor], Tensor]
) -> Tensor:
    """The prediction of a call of which the conditional rows are computed; `stand_in` makes the others from theirs."""
    cond = proceed(replace(call.take(rows[1]), branch="cond"))
    pair = [stand_in(cond), cond]
    return torch.cat(pair if int(rows[0][0]) == 0 else pair[::-1])
