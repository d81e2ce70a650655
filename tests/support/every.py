"""Every method of the table at its tiny settings, and what a first run of each gives: shared by the generic tests."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from tiny import entries, make, run

from diffeff.core.config import Config
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.table import TABLE, config_class
from diffeff.pipeline import DiffEffPipeline

__all__ = ["CONFIGS", "EXACT", "HOMES", "STEPS", "applied", "attempt", "denoisers", "home", "label", "plain", "refusal"]

STEPS = 8
HOMES = ("wan", "sd", "flux-cfg")
"""One call per branch, both branches in one call, and a transformer of image and text tokens in one stream."""
EXACT = frozenset({"feature_slicing", "sliced_attention", "unpad_text"})
"""Methods that change nothing but the rounding of sums."""
CONFIGS: tuple[Config, ...] = tuple(config_class(entry["use"]).from_dict(entry) for entry in entries(TABLE))


def label(config: Config) -> str:
    """The method's name, and its site where that is an option."""
    return "-".join(str(part) for part in (config.name, getattr(config, "site", None)) if part)


@cache
def plain(family: str) -> torch.Tensor:
    """The output without any plan."""
    return run(family, make(family), steps=STEPS)


@cache
def denoisers(family: str) -> Any:
    """The denoisers of a pipeline that nothing is applied to."""
    return DiffEffPipeline(make(family)).denoisers


def applied(config: Config, family: str) -> DiffEffPipeline:
    """A fresh pipeline with the method alone."""
    return DiffEffPipeline(make(family), [config])


@cache
def attempt(config: Config, family: str) -> torch.Tensor | str:
    """What the first run of a fresh pipeline gives, or why the method is refused, at apply or at the run."""
    try:
        return run(family, applied(config, family), steps=STEPS)
    except (MethodInapplicable, ConfigError) as error:
        return str(error)


def refusal(config: Config, family: str) -> str:
    """Why the method cannot act on this family; empty where it can."""
    found = attempt(config, family)
    return found if isinstance(found, str) else ""


def home(config: Config, families: Iterable[str] = HOMES) -> str:
    """The first of these families that the method acts on."""
    reasons = {family: refusal(config, family) for family in families}
    able = [family for family, reason in reasons.items() if not reason]
    if not able:
        pytest.fail(f"{config.name} acts on no family: give it settings in diffeff/zoo/tiny/settings.py. {reasons}")
    return able[0]
