"""Presets: plans that need no tuning, from exact to fast. What each buys and costs is measured, see the README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A named plan: one line on what it is for, and its method entries as in a plan file."""

    summary: str
    methods: tuple[Mapping[str, Any], ...]


def _cache(interval: int, first: int, axis: str) -> dict[str, Any]:
    """Over sigma at short intervals, over the step's number at longer ones: measured so on flow and noise models."""
    options = {"interval": interval, "predictor": "quadratic", "axis": axis, "first": first}
    return {"use": "feature_cache", "site": "step", **options}


PRESETS: Mapping[str, Preset] = {
    "lossless": Preset("bit-identical to plain diffusers; measures and reports only", ()),
    "high": Preset("the same picture to the eye: every second step is predicted", (_cache(2, 3, "time"),)),
    "balanced": Preset(
        "half the time or less, hardly a visible change: two steps of three are predicted", (_cache(3, 2, "index"),)
    ),
    "fast": Preset("a third of the time, keeps to the prompt; details may change", (_cache(5, 2, "index"),)),
}
