"""Feature maps between the blocks of a UNet: stored, or computed again from what is stored, some rows at a time.

A UNet passes its feature maps from block to block itself, and holds on to them until it is done. `Kept` stands in its
hands for such a map: the blocks read rows through it, recompute what is cheap, overwrite what nobody reads again and
let go of it while the UNet still holds the stand-in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Computed", "Kept", "Source", "Stored", "Summed", "real", "source_of"]

Shape = tuple[int, ...]


class Source(Protocol):
    """Where the rows of a feature map [rows, channels, height, width] come from."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`; may be a view of something stored, so not to be written to."""

    def whole(self) -> Tensor:
        """All rows, for readers that we do not know: from then on nothing of it is overwritten."""

    def spare(self) -> Tensor | None:
        """A tensor of the map's shape that its last reader may write over, row by row behind what it has read."""


class Stored:
    """A tensor. `owned` says that no one else reads it, so that its last reader may write over it."""

    def __init__(self, tensor: Tensor, owned: bool) -> None:
        self.tensor = tensor
        self.owned = owned
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]

    def whole(self) -> Tensor:
        self.owned = False
        return self.tensor

    def spare(self) -> Tensor | None:
        return self.tensor if self.owned and self.tensor.is_contiguous() else None


class Computed:
    """Rows that `operator` makes of the same rows of another map, anew each time they are read."""

    def __init__(self, operator: Callable[[Tensor], Tensor], source: Source, shape: Shape) -> None:
        self._operator = operator
        self._source = source
        self._whole: Tensor | None = None
        self.shape = (source.shape[0], *shape)
        self.dtype, self.device = source.dtype, source.device

    def rows(self, start: int, stop: int) -> Tensor:
        if self._whole is not None:
            return self._whole[start:stop]
        return self._operator(self._source.rows(start, stop))

    def whole(self) -> Tensor:
        if self._whole is None:
            self._whole = self.rows(0, self.shape[0])
        return self._whole

    def spare(self) -> Tensor | None:
        return None


class Summed:
    """A map with a residual (of a ControlNet) on top, which stays the caller's."""

    def __init__(self, source: Source, residual: Tensor) -> None:
        self._source = source
        self._residual = residual
        self.shape, self.dtype, self.device = source.shape, source.dtype, source.device

    def rows(self, start: int, stop: int) -> Tensor:
        one = self._residual.shape[0] == 1
        return self._source.rows(start, stop) + (self._residual if one else self._residual[start:stop])

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def spare(self) -> Tensor | None:
        return self._source.spare()


class Kept(Tensor):
    """A stand-in with the shape of a feature map and no memory. Any operator on it works on the real thing."""

    source: Source | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: Source) -> Kept:
        kept: Kept = Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=source.device)
        kept.source = source
        return kept

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.add.Tensor and type(args[0]) is Kept and _is_residual(args[0], args[1:], kwargs):
            return Kept(Summed(_alive(args[0]), args[1]))
        return func(*tree_map_only(Kept, real, args), **tree_map_only(Kept, real, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Kept({tuple(self.shape)}, {type(self.source).__name__})"

    def release(self) -> None:
        """Nobody reads it again: what it stood for may be freed."""
        self.source = None


def _is_residual(kept: Kept, rest: Any, kwargs: Any) -> bool:
    other = rest[0] if len(rest) == 1 and not kwargs else None
    if not isinstance(other, Tensor) or isinstance(other, Kept) or other.dtype is not kept.dtype:
        return False
    return other.shape[1:] == kept.shape[1:] and other.shape[0] in (1, kept.shape[0])


def _alive(kept: Kept) -> Source:
    if kept.source is None:
        raise RuntimeError(
            f"a feature map {tuple(kept.shape)} of a sliced UNet was read after its last use. Take the feature_slicing "
            "plan off to look inside the UNet's blocks, or register a forward hook on the block."
        )
    return kept.source


def real(tensor: Tensor) -> Tensor:
    """The feature map itself."""
    return _alive(tensor).whole() if isinstance(tensor, Kept) else tensor


def source_of(tensor: Tensor) -> Source:
    """Where the rows of a block's input come from; a plain tensor belongs to someone else."""
    return _alive(tensor) if isinstance(tensor, Kept) else Stored(tensor, owned=False)
