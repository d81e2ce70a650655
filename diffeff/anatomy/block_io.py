"""How to read, replace, write and skip the streams of one block, from the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.anatomy.types import Memo, Streams
from diffeff.errors import UnsupportedModel

__all__ = ["Slot", "TokenIO", "UNetDownIO", "UNetMidIO", "UNetUpIO", "parameters", "unwrap"]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper; the module itself when there is none."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


@cache
def _class_parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the forward's parameters in order, without self. Read from the class: instances may be patched."""
    cls: Any = type(unwrap(module))
    return _class_parameters(cls)


# --- streams of a block -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Slot:
    """One parameter of a block's forward, given by keyword or by position."""

    name: str
    position: int

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Slot:
        """Raises UnsupportedModel when the block has no such parameter."""
        names = parameters(module)
        if name not in names:
            found = f"{type(unwrap(module)).__name__}.forward({', '.join(names)})"
            raise UnsupportedModel(f"{found} has no parameter {name!r}: this release of diffusers is not supported")
        return cls(name, names.index(name))

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None

    def put(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name not in kwargs and self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), dict(kwargs)
        return args, {**kwargs, self.name: value}


@dataclass(frozen=True)
class TokenIO:
    """Streams of a transformer block, [batch, tokens, channels] each.

    `image_at`, `text_at` are their places in the result tuple; `text` is None for blocks that leave text as it is,
    and these return the image tensor alone.
    """

    image: Slot
    text: Slot | None = None
    image_at: int = 0
    text_at: int = 1

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """The streams a block is called with."""
        return Streams(self.image.get(args, kwargs), None if self.text is None else self.text.get(args, kwargs))

    def replace(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], streams: Streams
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other streams."""
        args, named = self.image.put(args, kwargs, streams.image)
        return (args, named) if self.text is None else self.text.put(args, named, streams.text)

    def outputs(self, result: Any) -> Streams:
        """The streams in a block's result; `text` is None where the block drops it (the last of SD3)."""
        if isinstance(result, Tensor):
            return Streams(result)
        return Streams(result[self.image_at], None if self.text is None else result[self.text_at])

    def write(self, streams: Streams, result: Any | None = None) -> Any:
        """A block result that carries `streams`."""
        if self.text is None and not isinstance(result, tuple | list):
            return streams.image
        items = [None, None] if result is None else list(result)
        items[self.image_at] = streams.image
        if self.text is not None:
            items[self.text_at] = streams.text
        return tuple(items)

    def memo(self, result: Any) -> Memo | None:
        """None: the input passes through."""
        return None

    def skipped(self, streams: Streams, memo: Memo | None) -> Any:
        """The block's input as its output."""
        return self.write(streams)


@dataclass(frozen=True)
class _MapIO:
    """Streams of a UNet block: the feature map [batch, channels, height, width] alone."""

    image: Slot

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """The feature map a block is called with."""
        return Streams(self.image.get(args, kwargs))

    def replace(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], streams: Streams
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with another feature map."""
        return self.image.put(args, kwargs, streams.image)

    def outputs(self, result: Any) -> Streams:
        """The feature map a block returns."""
        return Streams(result)

    def write(self, streams: Streams, result: Any | None = None) -> Any:
        """The feature map."""
        return streams.image


@dataclass(frozen=True)
class UNetMidIO(_MapIO):
    """The mid block keeps the shape of its input, which therefore stands in for its output."""

    def memo(self, result: Any) -> Memo | None:
        """None: the input passes through."""
        return None

    def skipped(self, streams: Streams, memo: Memo | None) -> Any:
        """The block's input as its output."""
        return streams.image


@dataclass(frozen=True)
class UNetUpIO(_MapIO):
    """An up block changes size and channels: skipped, it returns zeros of the remembered shape."""

    def memo(self, result: Any) -> Memo | None:
        """The shape of the feature map."""
        return Memo((result.shape,), result.dtype, result.device)

    def skipped(self, streams: Streams, memo: Memo | None) -> Any:
        """Zeros that take no memory. Raises ValueError when the block was never computed at this size."""
        return _stand_ins(memo)[0]


@dataclass(frozen=True)
class UNetDownIO(_MapIO):
    """A down block returns the feature map and the skip connections made on the way."""

    def outputs(self, result: Any) -> Streams:
        """The feature map a block returns."""
        return Streams(result[0])

    def write(self, streams: Streams, result: Any | None = None) -> Any:
        """The feature map with the skip connections of `result`, without which there is nothing to write."""
        if result is None:
            raise ValueError("a UNet's down block cannot be written without a result that holds its skip connections")
        return (streams.image, *result[1:])

    def memo(self, result: Any) -> Memo | None:
        """The shapes of the feature map and of each skip connection."""
        image, skips = result[0], result[1]
        return Memo((image.shape, *(s.shape for s in skips)), image.dtype, image.device)

    def skipped(self, streams: Streams, memo: Memo | None) -> Any:
        """Zeros of the remembered shapes; only up blocks that are skipped as well may consume them."""
        image, *skips = _stand_ins(memo)
        # T2I-Adapters add to the feature map in place, which an expanded tensor refuses.
        return image.clone(), tuple(skips)


def _stand_ins(memo: Memo | None) -> list[Tensor]:
    if memo is None:
        raise ValueError("a UNet block can be skipped only after it was computed once at this size")
    zero = torch.zeros((), dtype=memo.dtype, device=memo.device)
    return [zero.expand(shape) for shape in memo.shapes]
