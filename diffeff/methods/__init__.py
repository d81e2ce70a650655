"""The methods, by kind. `from diffeff.methods import FeatureCache` imports that one module and no other."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from diffeff.methods.table import TABLE

_PLACES = {place.split(":")[1]: place.split(":")[0] for place in TABLE.values()}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
