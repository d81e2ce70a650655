"""One measured number with everything needed to read it: its interval, how many items, from which features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Better", "Interval", "Result", "bootstrap_mean"]

Better = Literal["higher", "lower", "neither"]

_DRAWS = 1 << 17


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and how it was made: `bootstrap over items, 1000 resamples`, `Wilson`, ..."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Result:
    """The value of one metric over a set of `n` items.

    `metric` is the name a user asked for (`fid`), `label` what a report prints (`FID-sprites`): it names the features
    whenever the number depends on them. `value` may be infinite (the PSNR of identical clips). `features` records the
    source: spec, sha256, dimension, resize and crop. `notes` say what a reader must know, such as too few items.
    """

    metric: str
    label: str
    value: float
    unit: str
    better: Better
    n: int
    interval: Interval | None = None
    features: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. A number JSON cannot hold is null; `infinite` then says so."""
        data = asdict(self) | {"notes": list(self.notes), "infinite": math.isinf(self.value)}
        data["value"] = self.value if math.isfinite(self.value) else None
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`."""
        rest = {k: v for k, v in data.items() if k not in {"infinite", "interval", "notes", "value"}}
        value = math.inf if data["infinite"] else math.nan if data["value"] is None else float(data["value"])
        interval = None if data["interval"] is None else Interval(**data["interval"])
        return cls(value=value, interval=interval, notes=tuple(data["notes"]), **rest)


def bootstrap_mean(
    values: NDArray[np.floating[Any]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    statistic: Callable[[NDArray[Any]], NDArray[Any]] = lambda rows: rows.mean(axis=1),
) -> Interval:
    """95 % percentile bootstrap interval of the mean (or another `statistic` along axis 1) over items, [N] in.

    Raises ValueError for fewer than two values: one item says nothing about the spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 items, got {len(values)}")
    items, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    at_once = max(1, _DRAWS // len(items))  # memory does not grow with the items
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    found = [statistic(items[random.integers(0, len(items), (size, len(items)))]) for size in sizes]
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return Interval(float(low), float(high), f"bootstrap over items, {resamples} resamples")
