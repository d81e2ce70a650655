"""One block of a transformer on slices, and whether it may overwrite what it is given."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit_attention import check_processor
from diffeff.methods.memory.dit_engine import Work, run
from diffeff.methods.memory.dit_patch import watched

__all__ = ["Embedder", "Passed", "SlicedBlock"]


class Passed:
    """The streams that were put out last and nobody else has seen: the next block may overwrite them.

    Known by their storage, of which no reference is kept.
    """

    def __init__(self) -> None:
        self._known: list[weakref.ref[UntypedStorage]] = []

    def set(self, result: Any) -> None:
        """What a block or the embedding puts out."""
        tensors = result if isinstance(result, tuple) else (result,)
        self._known = [weakref.ref(t.untyped_storage()) for t in tensors if t is not None]

    def take(self, streams: list[Tensor]) -> list[bool]:
        """Which of these they are; asked once."""
        known, self._known = [ref() for ref in self._known], []
        return [any(x.untyped_storage() is s for s in known) for x in streams]


class Embedder:
    """The layer that makes tokens of the latents: its result is laid out as tokens and handed to the first block."""

    def __init__(self, inner: Callable[..., Tensor], layout: str, passed: Passed) -> None:
        self.inner, self.layout, self.passed = inner, layout, passed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.inner(*args, **kwargs)
        if self.layout == "grid":  # [batch, channels, frames, rows, columns]: tokens are made of it without a copy
            out = out.contiguous(memory_format=torch.channels_last_3d)
        elif self.layout == "copied":
            out = out.contiguous()
        if not torch.compiler.is_compiling():
            self.passed.set(out)
        return out


class SlicedBlock:
    """A block's forward on slices."""

    def __init__(
        self,
        block: nn.Module,
        path: str,
        form: Callable[..., Work],
        processors: tuple[str, ...],
        share: Share,
        passed: Passed,
    ) -> None:
        self.block, self.path, self.form, self.processors = block, path, form, processors
        self.share, self.passed, self.temporaries = share, passed, _temporaries(block)
        self.forward = self._forward  # one bound method, to be recognised by identity

    def check(self) -> None:
        """Raises PlanConflict when an attention of the block is not diffusers' own."""
        for name, module in self.block.named_children():
            if hasattr(module, "processor"):
                check_processor(module, f"{self.path}.{name}", self.processors)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if _wants_gradients(*args, *kwargs.values()):
            return type(self.block).forward(self.block, *args, **kwargs)
        self.check()
        work = self.form(self.block, *args, **kwargs)
        if torch.compiler.is_compiling():
            return run(work, self.share, self.temporaries)
        ours, alone = self.passed.take(work.streams), self._unobserved()
        result = run(work, self.share, self.temporaries, [alone and own for own in ours])
        if alone:
            self.passed.set(result)
        return result

    def _unobserved(self) -> bool:
        """Whether nobody but us sees what goes into and out of the block."""
        return self.block.__dict__.get("forward") is self.forward and not watched(self.block, besides=("forward",))


def _wants_gradients(*values: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)


_FEED_FORWARDS = ("ff", "ffn", "proj_mlp")


def _temporaries(block: nn.Module) -> int:
    """Channels that a token holds in passing at most: in and out of the activation of the feed-forward, the joined
    input of a last projection, and a handful of the stream's own width."""
    layers = [m for name in _FEED_FORWARDS for m in getattr(block, name, nn.Identity()).modules()]
    sizes = [int(getattr(m, side, 0)) for m in layers for side in ("in_features", "out_features")]
    width, inner = min(size for size in sizes if size), max(sizes)
    return (3 if hasattr(block, "proj_mlp") else 2) * inner + 5 * width
