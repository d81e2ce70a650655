"""The seams inside a denoiser: what stands in front of one block, one attention module, one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.anatomy.types import AttentionSite, BlockSite, Memo, ModuleSite, Segment, Streams
from diffeff.core.chains import AttentionTap
from diffeff.core.method import Method, Outputs, SkipSegment
from diffeff.core.run import Run
from diffeff.core.seams import Handler

__all__ = [
    "SegmentNotes",
    "attention_handler",
    "block_handler",
    "linear_handler",
    "module_handler",
    "segment_handler",
]

Present = Callable[[], "Run | None"]
"""The run whose denoiser call is in progress; None outside of one, where every seam passes through."""


@dataclass
class SegmentNotes:
    """What the blocks of a segment tell each other during a run."""

    entered: dict[str, Streams] = field(default_factory=dict)
    """The streams each segment was entered with in this call."""
    predicting: dict[str, bool] = field(default_factory=dict)
    memos: dict[tuple[str, torch.Size], Memo | None] = field(default_factory=dict)
    """What each block returned when it was last computed, by the shape of its input."""

    def clear(self) -> None:
        for notes in (self.entered, self.predicting, self.memos):
            notes.clear()


def segment_handler(
    present: Present, notes: SegmentNotes, method: Method[Any], segment: Segment, block: BlockSite
) -> Handler:
    """The seam of one block of a segment that `method` may skip whole: decides at the first block, predicts at the
    last, passes on in between."""
    first, last, io = block is segment.blocks[0], block is segment.blocks[-1], block.io
    key = f"{id(method)}:{segment.name}"

    def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = present()
        if run is None:
            return inner(*args, **kwargs)
        streams = io.read(args, kwargs)
        shape = block.name, streams.image.shape
        if first:
            notes.entered[key] = streams
            notes.predicting[key] = not method.enter_segment(run, segment, streams)
        if not notes.predicting.get(key, False):
            try:
                result = inner(*args, **kwargs)
            except SkipSegment as late:
                if late.owner is not method or not first:
                    raise
                notes.predicting[key] = True
            else:
                notes.memos[shape] = io.memo(result)
                if last:
                    method.leave_segment(run, segment, notes.entered.pop(key), io.outputs(result))
                return result
        run.count_skipped_block(block.share)
        if not last:
            return io.skipped(streams, notes.memos.get(shape))
        return io.write(method.predict_segment(run, segment, notes.entered.pop(key)))

    return handle


def block_handler(present: Present, block: BlockSite, method: Method[Any]) -> Handler:
    """The seam of one block that `method` wraps."""

    def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = present()
        if run is None:
            return inner(*args, **kwargs)
        raw: list[Any] = []

        def compute(streams: Streams) -> Streams:
            a, k = block.io.replace(args, kwargs, streams)
            raw.append(inner(*a, **k))
            return block.io.outputs(raw[-1])

        after = method.around_block(run, block, block.io.read(args, kwargs), compute)
        return block.io.write(after, raw[-1] if raw else None)

    return handle


def attention_handler(present: Present, site: AttentionSite, methods: Sequence[Method[Any]]) -> Handler:
    """The seam of one attention module."""

    def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = present()
        if run is None:
            return inner(*args, **kwargs)
        with AttentionTap(run, site, methods) as tap:
            result = inner(*args, **kwargs)
        if not tap.calls:
            run.warn(f"attention {site.name} does not use scaled_dot_product_attention: methods had no effect on it")
        return result

    return handle


def module_handler(present: Present, site: ModuleSite, method: Method[Any]) -> Handler:
    """The seam of one attention or feed-forward module that `method` wraps as a whole."""

    def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = present()
        if run is None:
            return inner(*args, **kwargs)

        def compute(other: Tensor | None = None) -> Outputs:
            a, k = (args, kwargs) if other is None else _with_first(args, kwargs, other)
            result = inner(*a, **k)
            return result if isinstance(result, tuple) else (result,)

        hidden = args[0] if args else kwargs["hidden_states"]
        outputs = method.around_module(run, site, hidden, compute)
        return outputs if len(outputs) > 1 else outputs[0]

    return handle


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def linear_handler(present: Present, path: str, module: nn.Module, method: Method[Any]) -> Handler:
    """The seam of one linear layer."""

    def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = present()
        if run is None:
            return inner(*args, **kwargs)
        if not args:  # some models pass `input` by keyword
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        return method.around_linear(run, path, module, args[0], lambda x: inner(x, *args[1:], **kwargs))

    return handle
