"""Other acceleration tools found on a pipeline: two that skip the same work compound in silence, so we refuse."""

from __future__ import annotations

from typing import Any

from diffeff.anatomy.types import DenoiserMap
from diffeff.errors import PlanConflict

__all__ = ["refuse_strangers"]


def _diffusers_cache(pipeline: Any, module: Any) -> bool:
    return bool(getattr(module, "is_cache_enabled", False))


def _cache_dit(pipeline: Any, module: Any) -> bool:
    return any(bool(vars(o).get("_is_cached")) for o in (type(pipeline), type(module), module))


def _deepcache(pipeline: Any, module: Any) -> bool:
    forward = module.__dict__.get("forward")
    return (getattr(forward, "__module__", None) or "").startswith("DeepCache")


def _tomesd(pipeline: Any, module: Any) -> bool:
    return hasattr(module, "_tome_info")


def _para_attn(pipeline: Any, module: Any) -> bool:
    return (getattr(module.__dict__.get("forward"), "__module__", None) or "").startswith("para_attn")


_KNOWN = {
    "diffusers' own cache": (_diffusers_cache, "call {name}.disable_cache() first"),
    "cache-dit": (_cache_dit, "call cache_dit.disable_cache(pipe) first"),
    "DeepCache": (_deepcache, "call its helper.disable() first"),
    "tomesd": (_tomesd, "call tomesd.remove_patch(pipe) first"),
    "para-attn": (_para_attn, "load the pipeline anew without it"),
}


def refuse_strangers(pipeline: Any, denoisers: tuple[DenoiserMap, ...]) -> None:
    """Raise PlanConflict when another tool already skips work in one of the denoisers."""
    for denoiser in denoisers:
        for tool, (present, cure) in _KNOWN.items():
            if present(pipeline, denoiser.module):
                raise PlanConflict(
                    f"{tool} is active on {denoiser.name} ({type(denoiser.module).__name__}). Two tools that skip the "
                    f"same work compound their errors unseen: {cure.format(name=denoiser.name)}, then apply the plan."
                )
