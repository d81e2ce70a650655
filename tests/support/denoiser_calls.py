"""A tiny transformer and the call its pipeline makes to it, to be repeated in variants, and in slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from tiny import call_kwargs, make
from torch import Tensor, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit import slice_dit

__all__ = ["captured", "forward", "relative", "sliced"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@cache
def _captured(family: str, batch: int, guidance: bool, size: tuple[int, ...] | None) -> tuple[nn.Module, Call]:
    pipe = make(family)
    calls: list[Call] = []
    model = pipe.transformer
    hook = model.register_forward_pre_hook(lambda _, a, k: calls.append((a, dict(k))), with_kwargs=True)
    kwargs = call_kwargs(family, pipe, steps=2, batch=batch, guidance=guidance, size=size)
    kwargs.pop("strength", None)
    pipe(**kwargs | {"output_type": "latent"})
    hook.remove()
    return model, calls[0]


def captured(
    family: str, *, batch: int = 1, guidance: bool = True, size: tuple[int, ...] | None = None
) -> tuple[Any, Call]:
    """The transformer and (args, kwargs) of the first call to it. The transformer is shared: leave it as it was."""
    model, (args, kwargs) = _captured(family, batch, guidance, size)
    return model, (args, {**kwargs, "return_dict": False})


def forward(model: nn.Module, call: Call) -> Tensor:
    """The prediction of that call. Dicts among the arguments are copied: some models pop from them."""
    args, kwargs = call
    kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
    with torch.no_grad():
        prediction: Tensor = model(*args, **kwargs)[0]
    return prediction


def relative(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||."""
    return float((out - reference).norm() / reference.norm())


@contextmanager
def sliced(model: nn.Module, slices: int | None = 3, limit: int | None = None) -> Iterator[None]:
    """The transformer in slices, for as long as the block lasts."""
    undo = slice_dit(model, Share(limit, slices))
    try:
        yield
    finally:
        undo()
