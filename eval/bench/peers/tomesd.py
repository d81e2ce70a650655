"""tomesd: similar tokens of a Stable Diffusion UNet are merged before attention."""

from __future__ import annotations

from diffeff.eval.bench.peers import Request, Undo

__all__ = ["token_merging"]


def token_merging(request: Request) -> Undo:
    """`tomesd.apply_patch(pipe, ratio=...)`."""
    import tomesd

    pipe = request.pipe
    tomesd.apply_patch(pipe, **request.options)

    def undo() -> None:
        tomesd.remove_patch(pipe)

    return undo
