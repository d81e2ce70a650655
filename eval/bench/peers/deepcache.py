"""DeepCache: the deep part of a UNet is reused at the steps between."""

from __future__ import annotations

from diffeff.eval.bench.peers import Request, Undo

__all__ = ["deep_cache"]


def deep_cache(request: Request) -> Undo:
    """`DeepCacheSDHelper(pipe)` with `set_params` and `enable`."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=request.pipe)
    helper.set_params(**request.options)
    helper.enable()

    def undo() -> None:
        helper.disable()

    return undo
