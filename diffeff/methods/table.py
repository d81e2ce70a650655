"""Every method diffeff knows: its name in plans and on the command line, and where its config lives.

A new method is one module and one line here. Modules are imported only when their method is asked for.
"""

from __future__ import annotations

from importlib import import_module

from diffeff.core.config import Config
from diffeff.errors import UnknownName, nearest

__all__ = ["TABLE", "config_class", "config_classes"]

TABLE: dict[str, str] = {
    "feature_cache": "diffeff.methods.caching.feature_cache:FeatureCache",
    "guidance_skip": "diffeff.methods.guidance.guidance_skip:GuidanceSkip",
    "kv_downsample": "diffeff.methods.tokens.kv_downsample:KVDownsample",
    "int8_weights": "diffeff.methods.quantization.int8_weights:Int8Weights",
}


def config_class(name: str) -> type[Config]:
    """The config class of the method called `name`. Raises UnknownName, naming the nearest."""
    if name not in TABLE:
        raise UnknownName(f"there is no method {name!r}. {nearest(name, TABLE)}")
    module, attribute = TABLE[name].split(":")
    found: type[Config] = getattr(import_module(module), attribute)
    return found


def config_classes() -> dict[str, type[Config]]:
    """All config classes by method name."""
    return {name: config_class(name) for name in TABLE}
