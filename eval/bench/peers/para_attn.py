"""ParaAttention's First Block Cache. It has no undo of its own: what it patches is put back here."""

from __future__ import annotations

from typing import Any

from diffeff.eval.bench.peers import Request, Undo

__all__ = ["first_block"]

_ABSENT = object()


def first_block(request: Request) -> Undo:
    """`apply_cache_on_pipe(pipe, residual_diff_threshold=...)`, which patches the pipeline's class."""
    from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe

    pipe, kind = request.pipe, type(request.pipe)
    transformer = getattr(pipe, "transformer", None)
    places = [(kind, "__call__"), (kind, "_is_cached"), (transformer, "forward"), (transformer, "_is_cached")]
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name in places if owner is not None]
    undo = _restoring(before)
    try:
        apply_cache_on_pipe(pipe, **request.options)
    except BaseException:
        undo()
        raise
    return undo


def _restoring(before: list[tuple[Any, str, Any]]) -> Undo:
    def undo() -> None:
        for owner, name, value in before:
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)

    return undo
