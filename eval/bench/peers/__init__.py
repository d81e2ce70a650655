"""Other acceleration tools that a bench compares with: one line per tool, one module per package.

A tool is put on a plain diffusers pipeline exactly as its own documentation says, with options of its own; nothing of
it is imported before it is asked for. `apply` returns what takes it off again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from diffeff.errors import MissingExtra, UnknownName, nearest

__all__ = ["PEERS", "Peer", "Request", "Undo", "installed", "peer"]

Scalar = bool | int | float | str
Options = Mapping[str, Scalar]
Undo = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """What an adapter may need beside the pipeline. `run(pipe)` is one plain call at the bench's settings, for tools
    that calibrate; `notes` takes what they found and gives it back in later processes."""

    pipe: Any
    options: Options
    steps: int
    run: Callable[[], None]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> Any:
        """The pipeline's transformer or UNet."""
        found = getattr(self.pipe, "transformer", None)
        return found if found is not None else self.pipe.unet


@dataclass(frozen=True)
class Peer:
    """One tool: its distribution, the function that puts it on, its default options, and the points of its curve."""

    package: str
    label: str
    apply: str
    options: Options
    sweep: tuple[Options, ...]
    group: str = ""
    """Peers of one group share a worker process; by default those of one package do."""

    @property
    def worker(self) -> str:
        return self.group or self.package

    def load(self) -> Callable[[Request], Undo]:
        """The adapter's function. Raises MissingExtra when the package is not installed."""
        if installed(self.package) is None:
            hint = "pip install torchao" if self.package == "torchao" else "pip install 'diffeff[peers]'"
            raise MissingExtra(f"{self.label} needs the package {self.package}: {hint}")
        module, name = self.apply.split(":")
        function: Callable[[Request], Undo] = getattr(import_module(f"{__name__}.{module}"), name)
        return function


def installed(package: str) -> str | None:
    """The version of a distribution; None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peer(name: str) -> Peer:
    """The peer called `name`. Raises UnknownName, naming the nearest."""
    if name not in PEERS:
        raise UnknownName(f"there is no peer {name!r}. {nearest(name, PEERS)}")
    return PEERS[name]


def _points(option: str, *values: Scalar) -> tuple[Options, ...]:
    return tuple({option: value} for value in values)


def _mag(threshold: float, skips: int) -> Options:
    return {"threshold": threshold, "max_skip_steps": skips}


_DBCACHE: Options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4}

_DB_POINTS = (
    *_points("residual_diff_threshold", 0.06, 0.12, 0.18, 0.24, 0.35),
    {"residual_diff_threshold": 0.5, "max_warmup_steps": 2},
)

PEERS: Mapping[str, Peer] = {
    "diffusers:fbcache": Peer(
        "diffusers",
        "diffusers FirstBlockCache",
        "diffusers_caches:first_block",
        {"threshold": 0.1},
        _points("threshold", 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    ),
    "diffusers:magcache": Peer(
        "diffusers",
        "diffusers MagCache",
        "diffusers_caches:mag_cache",
        _mag(0.06, 3),
        (_mag(0.03, 1), _mag(0.06, 2), _mag(0.12, 3), _mag(0.24, 4), _mag(0.5, 6)),
    ),
    "diffusers:taylorseer": Peer(
        "diffusers",
        "diffusers TaylorSeer (lite)",
        "diffusers_caches:taylor_seer",
        {"cache_interval": 3, "disable_cache_before_step": 3, "max_order": 1},
        _points("cache_interval", 2, 3, 4, 5, 6),
    ),
    "diffusers:pab": Peer(
        "diffusers",
        "diffusers Pyramid Attention Broadcast",
        "diffusers_caches:pyramid",
        {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2},
        tuple(
            {"spatial_attention_block_skip_range": n, "cross_attention_block_skip_range": m}
            for n, m in ((2, 2), (2, 4), (3, 6), (4, 8), (6, 12))
        ),
    ),
    "diffusers:seacache": Peer(
        "diffusers",
        "diffusers SeaCache",
        "diffusers_caches:sea_cache",
        {"threshold": 0.25, "max_consecutive_cached": 2},
        tuple(
            {"threshold": threshold, "max_consecutive_cached": most}
            for threshold, most in ((0.1, 1), (0.25, 2), (0.5, 2), (0.5, 4), (1.0, 6))
        ),
    ),
    "diffusers:fastercache": Peer(
        "diffusers",
        "diffusers FasterCache",
        "diffusers_caches:faster_cache",
        {"spatial_attention_block_skip_range": 2, "unconditional_batch_skip_range": 5},
        _points("spatial_attention_block_skip_range", 2, 3, 4, 6),
    ),
    "cache-dit:dbcache": Peer(
        "cache-dit",
        "cache-dit DBCache",
        "cache_dit:dbcache",
        {**_DBCACHE, "residual_diff_threshold": 0.12},
        _DB_POINTS,
    ),
    "cache-dit:dbcache-taylor": Peer(
        "cache-dit",
        "cache-dit DBCache with TaylorSeer",
        "cache_dit:dbcache_taylor",
        {**_DBCACHE, "residual_diff_threshold": 0.12, "taylorseer_order": 1},
        _DB_POINTS,
    ),
    "deepcache": Peer(
        "DeepCache",
        "DeepCache",
        "deepcache:deep_cache",
        {"cache_interval": 3, "cache_branch_id": 0},
        _points("cache_interval", 2, 3, 5, 7, 10),
    ),
    "tomesd": Peer(
        "tomesd",
        "tomesd",
        "tomesd:token_merging",
        {"ratio": 0.5, "max_downsample": 1},
        _points("ratio", 0.2, 0.35, 0.5, 0.6, 0.75),
    ),
    "para-attn:fbcache": Peer(
        "para-attn",
        "ParaAttention First Block Cache",
        "para_attn:first_block",
        {"residual_diff_threshold": 0.1},
        _points("residual_diff_threshold", 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    ),
    "torchao:int8wo": Peer("torchao", "torchao int8 weights", "torchao:int8_weights", {}, ({},)),
    "torchao:int8dq": Peer("torchao", "torchao int8 dynamic", "torchao:int8_dynamic", {}, ({},)),
}
"""Every peer by its name on the command line."""
