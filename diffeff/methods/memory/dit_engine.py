"""How a transformer block runs on slices of tokens: sub-layer after sub-layer, only its streams and K, V whole.

A block is a chain of sub-layers x <- leave(x, f(enter(x))): attention, cross-attention, feed-forward. All but the
mixing of tokens inside an attention works on each token alone, so a maximal run of sub-layers is carried through on one
slice before the next is touched. What ends a run is an attention, whose keys and values need every token first, and a
module that somebody else watches, which is called once on whole tensors.

Source: operator grouping as in Streamlined Inference (arXiv 2411.01171), along tokens; the form for transformers, with
queries that never exist whole, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.dit_patch import watched

__all__ = ["Stage", "Work", "run", "slices_of", "spans"]

Rows = slice
"""Tokens of one stream, first to last + 1."""


@dataclass(frozen=True)
class Stage:
    """One sub-layer. Streams are named by their number; every tensor is [batch, tokens, channels] of the given rows.

    `enter(stream, x, rows)`: what the module is called with. `apply(stream, hidden, rows)`: what it gives for these
    rows. `leave(stream, x, hidden, y, rows)`: the stream with that added. `whole(hiddens)`: the module called as it
    would be without slicing, one result per stream. `gather(stream, hidden, rows)`: for attentions, called for all
    rows before the first `apply`.
    """

    modules: tuple[nn.Module, ...]
    enter: Callable[[int, Tensor, Rows], Tensor]
    apply: Callable[[int, Tensor, Rows], Any]
    leave: Callable[[int, Tensor, Tensor, Any, Rows], Tensor]
    whole: Callable[[list[Tensor]], Sequence[Any]]
    gather: Callable[[int, Tensor, Rows], None] | None = None


@dataclass(frozen=True)
class Work:
    """One call of a block: its streams in the order of the joint sequence, its sub-layers, and the form of its result.

    `ends`: streams that feed the attention but are not put out (the text of SD3's last block). `keys`: channels of
    keys and values that a token has in all.
    """

    streams: list[Tensor]
    stages: list[Stage]
    pack: Callable[[list[Tensor]], Any]
    keys: int
    ends: frozenset[int] = frozenset()


def spans(tokens: int, count: int) -> list[Rows]:
    """`tokens` cut into `count` slices of ceil(tokens / count), the last one shorter; fewer where that suffices."""
    size = max(-(-tokens // count), 1)
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)]


_DEFAULT = {"cpu": 512, "other": 4096}
"""Tokens of a slice that cost no measurable time: matrix products this tall keep the device busy."""


def slices_of(x: Tensor, share: Share, temporaries: int, tokens: int | None = None, whole: int = 0) -> list[Rows]:
    """The slices of one stream [batch, tokens, channels] that holds `temporaries` channels per token in passing.

    `tokens`: of all streams together, all cut to slices of the same size; `whole`: bytes that are held besides.
    """
    own = x.shape[1]
    tokens = own if tokens is None else tokens
    if share.slices is not None:
        return spans(own, share.slices)
    if share.activation_bytes is None:
        least = _DEFAULT["cpu" if x.device.type == "cpu" else "other"]
        count = max(x.shape[0] * tokens // least, 1)
    else:
        count = share.count(tokens, x.shape[0] * x.element_size() * temporaries, whole)
    size = max(-(-tokens // count), 1)
    return spans(own, max(-(-own // size), 1))


def _cuts(work: Work, share: Share, temporaries: int) -> list[list[Rows]]:
    first = work.streams[0]
    tokens = sum(x.shape[1] for x in work.streams)
    whole = tokens * first.shape[0] * first.element_size() * (2 * first.shape[2] + work.keys)
    return [slices_of(x, share, temporaries, tokens, whole) for x in work.streams]


def run(work: Work, share: Share, temporaries: int, reuse: Sequence[bool] = ()) -> Any:
    """The block's result.

    `temporaries`: channels that a token holds in passing at most, for a share that is a number of bytes. `reuse`:
    which streams may be overwritten, because nobody else holds them.
    """
    cuts = _cuts(work, share, temporaries)
    free = [stream in work.ends or (bool(reuse) and reuse[stream]) for stream in range(len(work.streams))]
    outs = [_output(x, own) for x, own in zip(work.streams, free, strict=True)]
    sweep = _Sweep(work, cuts, outs)
    for stage in work.stages:
        if any(watched(module) for module in stage.modules):
            sweep.flush()
            sweep.pending = [_given(stage, sweep)]
        elif stage.gather is not None:
            sweep.flush()
            sweep.collect(stage, stage.gather)
            sweep.pending = [stage]
        else:
            sweep.pending.append(stage)
    sweep.flush()
    return work.pack(outs)


def _output(x: Tensor, reuse: bool) -> Tensor:
    return x if reuse and x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Sweep:
    """The streams as they stand, and the sub-layers still to be carried through."""

    def __init__(self, work: Work, cuts: list[list[Rows]], outs: list[Tensor]) -> None:
        self.work, self.cuts, self.outs = work, cuts, outs
        self.now = list(work.streams)
        self.pending: list[Stage] = []

    def flush(self) -> None:
        """Carry the pending sub-layers through, slice by slice, and write the streams."""
        if not self.pending:
            return
        for stream, cut in enumerate(self.cuts):
            if stream in self.work.ends:
                continue
            for rows in cut:
                self.outs[stream][:, rows] = self._through(stream, self.now[stream][:, rows], rows)
            self.now[stream] = self.outs[stream]
        self.pending = []

    def _through(self, stream: int, x: Tensor, rows: Rows) -> Tensor:
        for stage in self.pending:
            hidden = stage.enter(stream, x, rows)
            x = stage.leave(stream, x, hidden, stage.apply(stream, hidden, rows), rows)
        return x

    def collect(self, stage: Stage, gather: Callable[[int, Tensor, Rows], None]) -> None:
        """Show every row to an attention: it keeps keys and values."""
        for stream, cut in enumerate(self.cuts):
            for rows in cut:
                gather(stream, stage.enter(stream, self.now[stream][:, rows], rows), rows)

    def entered(self, stage: Stage) -> list[Tensor]:
        """What a sub-layer's module is called with, whole, computed slice by slice."""
        return [self._entered(stage, stream, cut) for stream, cut in enumerate(self.cuts)]

    def _entered(self, stage: Stage, stream: int, cut: list[Rows]) -> Tensor:
        x, whole = self.now[stream], None
        for rows in cut:
            hidden = stage.enter(stream, x[:, rows], rows)
            if whole is None:
                whole = hidden.new_empty((*x.shape[:2], *hidden.shape[2:]))
            whole[:, rows] = hidden
        return x if whole is None else whole


def _given(stage: Stage, sweep: _Sweep) -> Stage:
    """The same sub-layer with its module called once, on whole tensors."""
    hiddens = sweep.entered(stage)
    results = stage.whole(hiddens)
    return Stage(
        modules=(),
        enter=lambda stream, x, rows: hiddens[stream][:, rows],
        apply=lambda stream, hidden, rows: _rows(results[stream], rows),
        leave=stage.leave,
        whole=stage.whole,
    )


def _rows(y: Any, rows: Rows) -> Any:
    return tuple(part[:, rows] for part in y) if isinstance(y, tuple) else y[:, rows]
