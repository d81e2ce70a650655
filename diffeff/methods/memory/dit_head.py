"""The output head of a transformer in slices: norm, modulation and projection of a few tokens at a time.

The model's own forward writes the head out as norm, arithmetic, projection on whole tensors. Its norm is made to give
a note of what is to be done instead of a tensor; the arithmetic adds to the note; the projection carries it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit_engine import slices_of

__all__ = ["Deferred", "deferring", "projecting"]

Rows = slice
Step = Callable[[Tensor, Rows], Tensor]


class Deferred:
    """Token-wise arithmetic on [batch, tokens, channels] that waits to be carried out on slices of tokens.

    Understands what the heads of diffusers' transformers do: times or plus a tensor [batch or 1, 1 or tokens,
    channels], and a cast to the type of another tensor.
    """

    def __init__(self, x: Tensor, steps: tuple[Step, ...] = ()) -> None:
        self.x, self.steps = x, steps

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def then(self, step: Step) -> Deferred:
        return Deferred(self.x, (*self.steps, step))

    def __mul__(self, other: Tensor) -> Deferred:
        return self.then(lambda x, rows: x * _rows(other, rows))

    def __add__(self, other: Tensor) -> Deferred:
        return self.then(lambda x, rows: x + _rows(other, rows))

    def type_as(self, other: Tensor) -> Deferred:
        return self.then(lambda x, rows: x.type_as(other))

    def at(self, rows: Rows) -> Tensor:
        """The result for these tokens."""
        x = self.x[:, rows]
        for step in self.steps:
            x = step(x, rows)
        return x


def _rows(x: Tensor, rows: Rows) -> Tensor:
    return x if x.ndim < 2 or x.shape[1] == 1 else x[:, rows]


def deferring(norm: nn.Module) -> Callable[..., Any]:
    """A forward for a norm of the head: notes the norm down, with its conditioning."""
    plain = type(norm).forward

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler cannot follow the note, and plans the memory of the head itself
            return plain(norm, x, *args, **kwargs)
        noted = x if isinstance(x, Deferred) else Deferred(x)
        return noted.then(lambda part, rows: plain(norm, part, *args, **kwargs))

    return forward


def projecting(share: Share, inner: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """A forward for the projection behind such a norm: carries the note out, slice by slice."""

    def forward(x: Any) -> Tensor:
        if not isinstance(x, Deferred):
            return inner(x)
        out: Tensor | None = None
        for rows in slices_of(x.x, share, 6 * x.x.shape[2]):
            part = inner(x.at(rows))
            if out is None:
                out = part.new_empty((*x.x.shape[:2], part.shape[2]))
            out[:, rows] = part
        return inner(x.at(slice(0, 0))) if out is None else out

    return forward
