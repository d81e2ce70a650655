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
    # step and block caches
    "first_block_cache": "diffeff.methods.caching.published.first_block_cache:FirstBlockCache",
    "dbcache": "diffeff.methods.caching.published.dbcache:DBCache",
    "teacache": "diffeff.methods.caching.published.teacache:TeaCache",
    "magcache": "diffeff.methods.caching.published.magcache:MagCache",
    "easycache": "diffeff.methods.caching.published.easycache:EasyCache",
    "seacache": "diffeff.methods.caching.published.seacache:SeaCache",
    "dicache": "diffeff.methods.caching.published.dicache:DiCache",
    "bwcache": "diffeff.methods.caching.published.bwcache:BWCache",
    "taylorseer": "diffeff.methods.caching.published.taylorseer:TaylorSeer",
    "spectrum": "diffeff.methods.caching.published.spectrum:Spectrum",
    "l2p": "diffeff.methods.caching.published.l2p:L2P",
    "meancache": "diffeff.methods.caching.published.meancache:MeanCache",
    # module, branch and range caches
    "pab": "diffeff.methods.caching.published.pab:PAB",
    "fora": "diffeff.methods.caching.published.fora:FORA",
    "delta_dit": "diffeff.methods.caching.published.delta_dit:DeltaDiT",
    "blockdance": "diffeff.methods.caching.published.blockdance:BlockDance",
    "deepcache": "diffeff.methods.caching.published.deepcache:DeepCache",
    "step_rehash": "diffeff.methods.caching.published.step_rehash:StepRehash",
    "smoothcache": "diffeff.methods.caching.published.smoothcache:SmoothCache",
    "harmonica": "diffeff.methods.caching.published.harmonica:HarmoniCa",
    "tgate": "diffeff.methods.caching.published.tgate:TGate",
    "fastercache": "diffeff.methods.caching.published.fastercache:FasterCache",
    "adacache": "diffeff.methods.caching.published.adacache:AdaCache",
    "profilingdit": "diffeff.methods.caching.published.profilingdit:ProfilingDiT",
    "foresight": "diffeff.methods.caching.published.foresight:Foresight",
    "toca": "diffeff.methods.caching.published.toca:ToCa",
    "duca": "diffeff.methods.caching.published.duca:DuCa",
    "elastic_cache": "diffeff.methods.caching.published.elastic:ElasticCache",
    # search
    "fitted_solver": "diffeff.methods.sampling.fitted_solver:FittedSolver",
    "scheduled_cache": "diffeff.methods.caching.scheduled:ScheduledCache",
    "guidance_skip": "diffeff.methods.guidance.guidance_skip:GuidanceSkip",
    "unpad_text": "diffeff.methods.tokens.unpad_text:UnpadText",
    "kv_downsample": "diffeff.methods.tokens.kv_downsample:KVDownsample",
    "sliced_attention": "diffeff.methods.attention.sliced_attention:SlicedAttention",
    "feature_slicing": "diffeff.methods.memory.feature_slicing:FeatureSlicing",
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
