"""From what a user writes after `--features` to a feature source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from diffeff.errors import ConfigError, UnknownName, nearest
from diffeff.eval.features.source import FeatureSource

__all__ = ["KINDS", "Kind", "source"]

_Make = Callable[[str, torch.device], FeatureSource]


@dataclass(frozen=True)
class Kind:
    """One kind of source: how it is written, what it is for, and the function that makes it of its argument."""

    form: str
    summary: str
    make: _Make
    argument: bool = True


def _sprites(_: str, device: torch.device) -> FeatureSource:
    from diffeff.eval.features.sprites import SpritesFeatures

    return SpritesFeatures(device=device)


def _inception(path: str, device: torch.device) -> FeatureSource:
    from diffeff.eval.features.inception import InceptionFeatures

    return InceptionFeatures(path, device=device)


def _clip(where: str, device: torch.device) -> FeatureSource:
    from diffeff.eval.features.clip import ClipFeatures

    return ClipFeatures(where, device=device)


def _module(where: str, device: torch.device) -> FeatureSource:
    from diffeff.eval.features.module import module_features

    return module_features(where, device=device)


KINDS: Mapping[str, Kind] = {
    "sprites": Kind("sprites", "the bundled encoder of the sprites world; needs nothing", _sprites, argument=False),
    "inception": Kind("inception:PATH", "FID's Inception-v3 from its weights file", _inception),
    "clip": Kind("clip:DIR_OR_ID", "a CLIP from a folder or the hub: images and texts", _clip),
    "module": Kind("module:PACKAGE:FUNCTION", "a function of yours, from a package or a .py file", _module),
}


def source(spec: str, *, device: str | torch.device = "cpu") -> FeatureSource:
    """The feature source a user names: `sprites`, `inception:PATH`, `clip:DIR_OR_ID` or `module:PACKAGE:FUNCTION`.

    Loads the weights. Raises UnknownName for another kind, ConfigError for an argument that is missing or too many and
    for a device this machine lacks, ModelLoadError for weights that cannot be loaded.
    """
    from diffeff.eval.features.preprocess import device_of

    name, colon, argument = spec.strip().partition(":")
    if name not in KINDS:
        raise UnknownName(f"there are no features {spec!r}. {nearest(name, KINDS)} {_forms()}")
    kind = KINDS[name]
    if kind.argument and not argument.strip():
        raise ConfigError(f"features {spec!r} need more: write {kind.form} ({kind.summary})")
    if colon and not kind.argument:
        raise ConfigError(f"features {name!r} take no argument, got {argument!r}: write {kind.form}")
    return kind.make(argument.strip(), device_of(device))


def _forms() -> str:
    return "Write " + ", ".join(kind.form for kind in KINDS.values()) + "."
