"""cache-dit: DBCache, alone and with the TaylorSeer calibrator. It patches the pipeline's class."""

from __future__ import annotations

from typing import Any

from diffeff.eval.bench.peers import Request, Undo

__all__ = ["dbcache", "dbcache_taylor"]


def dbcache(request: Request) -> Undo:
    """`cache_dit.enable_cache(pipe, cache_config=DBCacheConfig(...))`."""
    return _enable(request, dict(request.options), None)


def dbcache_taylor(request: Request) -> Undo:
    """The same with `calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=...)`."""
    import cache_dit

    options = dict(request.options)
    order = options.pop("taylorseer_order")
    return _enable(request, options, cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order))


def _enable(request: Request, options: dict[str, Any], calibrator: Any) -> Undo:
    import cache_dit

    pipe = request.pipe
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**options), calibrator_config=calibrator)

    def undo() -> None:
        cache_dit.disable_cache(pipe)

    return undo
