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


PRESETS: Mapping[str, Preset] = {
    "lossless": Preset("bit-identical to plain diffusers; measures and reports only", ()),
    "high": Preset(
        "the same picture to the eye: a few steps in the middle are predicted",
        ({"use": "feature_cache", "site": "step", "policy": "interval", "interval": 2, "predictor": "linear"},),
    ),
    "balanced": Preset(
        "about half the time or less at close quality",
        ({"use": "feature_cache", "site": "step", "policy": "interval", "interval": 3, "predictor": "linear"},),
    ),
    "fast": Preset(
        "the most speed that keeps to the prompt; details change",
        ({"use": "feature_cache", "site": "step", "policy": "interval", "interval": 4, "predictor": "linear"},),
    ),
}
