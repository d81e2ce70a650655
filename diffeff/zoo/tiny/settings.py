"""Options at which a method acts on pipelines as tiny as these, in runs of 8 steps: one line per method.

A method without a line acts there as it is. Calibrated tables are made up: they are given over noise levels or
progress, so that they fit every family, and say nothing about quality.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["EXTRA", "SMALL", "entries"]

SMALL: Mapping[str, Mapping[str, Any]] = {
    "feature_cache": {"first": 1, "last": 1},
    "guidance_skip": {"first": 1, "last": 1},
    "unpad_text": {"multiple": 1},
    "kv_downsample": {"min_tokens": 4},
    "sliced_attention": {"slice_tokens": 6},
    "int8_weights": {"min_features": 8},
    "feature_slicing": {"slices": 3},
    # step and block-stack caches
    "first_block_cache": {"first": 1, "threshold": 1.0, "max_skips": 2},
    "dbcache": {"head": 1, "first": 2, "threshold": 1.0, "max_skips": 2},
    "teacache": {"coefficients": (1.0, 0.0), "threshold": 0.5, "max_skips": 2},
    "magcache": {"sigmas": (0.01, 1.0), "magnitudes": (1.0, 1.02), "threshold": 0.1},
    "easycache": {"threshold": 0.5, "max_skips": 2},
    "seacache": {"threshold": 2.0},
    "dicache": {"threshold": 2.0, "max_skips": 2},
    "bwcache": {"threshold": 5.0, "burst": 0.2},
    "taylorseer": {"interval": 3, "first": 2},
    "spectrum": {"first": 3},
    "meancache": {"sigmas": (1.0, 0.95, 0.7, 0.4), "spans": (1, 1, 2, 2)},
    "l2p": {"times": (0.5, 0.5), "horizons": (1, 2), "weights": (0.0, -0.9, 1.9, 0.0, -1.8, 2.8)},
    # module, branch and range caches
    "step_rehash": {"times": (1.0, 0.5, 0.0), "similarities": (0.9, 0.99), "first": 1},
    "smoothcache": {"kinds": ("self", "joint", "feed_forward"), "times": (1.0, 0.0), "errors": (0.01,) * 18},
    "harmonica": {
        "sites": ("self", "cross", "joint", "temporal", "feed_forward"),
        "times": (1.0, 0.0),
        "router": ("01000", "10000"),
    },
    "foresight": {"threshold": 100.0, "interval": 3},
    "profilingdit": {"blocks": (1, 2)},
    "elastic_cache": {"threshold": 2.0, "first": 1, "segments": 3},
    # search
    "scheduled_cache": {"actions": ("both", "both", "both", "none", "none", "both", "none", "cond")},
    "fitted_solver": {
        "timesteps": (990.0, 800.0, 600.0, 400.0, 200.0),
        "guided": (0, 1, 2, 3, 4),
        "updates": tuple(w for k in range(5) for w in (1.0, *(0.0,) * k, -0.2)),
    },
}

EXTRA: tuple[Mapping[str, Any], ...] = ({"use": "feature_cache", "site": "segment", "first": 1, "last": 1},)
"""Further entries of methods whose options change where they act."""


def entries(names: Iterable[str]) -> list[dict[str, Any]]:
    """One plan entry per method named, and the further ones."""
    return [*({"use": name, **SMALL.get(name, {})} for name in names), *map(dict, EXTRA)]
