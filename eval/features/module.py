"""`module:PACKAGE.MODULE:FUNCTION` or `module:FILE.py:FUNCTION`: features by a function of yours.

    # my_features.py, used as `--features module:my_features.py:features`
    def features(frames):                      # uint8 [N, 3, H, W], any size, on the device asked for
        return network(frames.float() / 255)   # float [N, D]: one row per image

Attributes of the function are optional and make it more: `label` (what reports print), `sha256` (of the weights it
loads), `preparation` (a dictionary: size, resize, crop, mean, std), `clips` (uint8 [N, F, 3, H, W] to [N, D']: features
of motion), `embed_texts` (a list of strings to [N, D] in the space of the images), `text_scale` (100 if not given) and
`maps` (uint8 [N, 3, H, W] to a list of [N, C, h, w]: layers for an LPIPS-style distance).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffeff.errors import ConfigError, DiffEffError, ModelLoadError, UnknownName, nearest
from diffeff.eval.features.preprocess import check_frames, check_rows, device_of, exactly, in_batches

__all__ = ["ModuleFeatures", "module_features"]

_FORM = "module:PACKAGE.MODULE:FUNCTION or module:FILE.py:FUNCTION"
_SIDE, _FRAMES = 224, 16
"""What a function is tried on: most networks take it."""


class ModuleFeatures:
    """Features of images by a function of the user's, checked on every call: shape, type, finite numbers.

    `sha256` covers the source file and, where given, the function's own `sha256` and `preparation`. The function is
    tried on two images first, so that a wrong one fails before any work is lost. Raises ConfigError when it fails or
    returns something else than [N, D] floats, and when an image's features depend on the others of its batch.
    """

    def __init__(self, spec: str, function: Any, module: ModuleType, device: torch.device) -> None:
        self.spec = spec
        self._own = function
        self._function = _guarded(function, spec)
        self._device = device
        self.label = str(getattr(function, "label", "") or _label(function, module))
        self.preparation = _preparation(function, spec)
        self.sha256 = _checksum(function, module, self.preparation)
        self.dim = _probed(self._function, spec, device)

    def images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, dim]."""
        check_frames(frames, self.spec)
        return self._rows(frames, lambda part: self._function(part.to(self._device)), self.dim)

    def describe(self) -> dict[str, Any]:
        """JSON-ready; the preparation is what the function says of itself."""
        untold = {"size": None, "resize": "not told by the function", "crop": None, "mean": None, "std": None}
        facts = {"spec": self.spec, "label": self.label, "sha256": self.sha256, "dim": self.dim}
        return {**untold, **self.preparation, **facts}

    def _rows(self, items: Tensor | Sequence[str], function: Callable[[Any], Tensor], dim: int) -> Tensor:
        return in_batches(items, function, dim=dim, device=self._device, spec=self.spec)


class _WithClips(ModuleFeatures):
    """A function with the attribute `clips`."""

    def __init__(self, spec: str, function: Any, module: ModuleType, device: torch.device) -> None:
        super().__init__(spec, function, module, device)
        self._clips = _guarded(function.clips, f"{spec}.clips")
        black = torch.zeros(1, _FRAMES, 3, _SIDE, _SIDE, dtype=torch.uint8, device=device)
        with exactly():
            self.clip_dim = _width(self._clips(black), 1, f"{spec}.clips")

    def clips(self, clips: Tensor) -> Tensor:
        """uint8 [N, F, 3, H, W] to float32 [N, clip_dim]."""
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[2] != 3:
            got = f"{clips.dtype} {list(clips.shape)}"
            raise ConfigError(f"features of {self.spec!r} need uint8 clips [N, F, 3, H, W], got {got}")
        return self._rows(clips, lambda part: self._clips(part.to(self._device)), self.clip_dim)


class _WithTexts(ModuleFeatures):
    """A function with the attribute `embed_texts`."""

    def __init__(self, spec: str, function: Any, module: ModuleType, device: torch.device) -> None:
        super().__init__(spec, function, module, device)
        self._texts = _guarded(function.embed_texts, f"{spec}.embed_texts")
        self.embed_dim = self.dim
        self.text_scale = getattr(function, "text_scale", 100.0)
        if not isinstance(self.text_scale, int | float) or not 0 < self.text_scale < math.inf:
            raise ConfigError(f"{spec}.text_scale must be a number above 0, got {self.text_scale!r}")
        self.embed_texts(["a picture"])

    def embed_images(self, frames: Tensor) -> Tensor:
        """The same as `images`."""
        return self.images(frames)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to float32 [N, embed_dim]."""
        return self._rows(list(texts), self._texts, self.embed_dim)


class _WithMaps(ModuleFeatures):
    """A function with the attribute `maps`."""

    def maps(self, frames: Tensor) -> list[Tensor]:
        """uint8 [N, 3, H, W] to a list of feature maps [N, C, h, w], for an LPIPS-style distance."""
        check_frames(frames, self.spec)
        with exactly():
            found = _guarded(self._own.maps, f"{self.spec}.maps")(frames.to(self._device))
        return list(found)


_ABILITIES: Mapping[str, type[ModuleFeatures]] = {"clips": _WithClips, "embed_texts": _WithTexts, "maps": _WithMaps}
"""Attribute of the function -> what it adds. A source has a method only if the function has it."""


def module_features(where: str, *, device: str | torch.device = "cpu") -> ModuleFeatures:
    """The source named `PACKAGE.MODULE:FUNCTION` or `FILE.py:FUNCTION`; with clips and texts if the function has them.

    Raises ConfigError for another form and for a function that breaks the contract, ModelLoadError for a module that
    cannot be imported, UnknownName for a function that it does not have.
    """
    name, _, attribute = where.rpartition(":")
    if not name or not attribute:
        raise ConfigError(f"features 'module:{where}' name no function. Write {_FORM}.")
    module = _imported(name)
    function = _attribute(module, attribute)
    bases = tuple(kind for ability, kind in _ABILITIES.items() if hasattr(function, ability))
    kind = type("ModuleFeatures", bases or (ModuleFeatures,), {})
    made: ModuleFeatures = kind(f"module:{where}", function, module, device_of(device))
    return made


def _imported(name: str) -> ModuleType:
    try:
        return _from_file(Path(name).expanduser()) if name.endswith(".py") else importlib.import_module(name)
    except DiffEffError:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        hint = f" Name a file by its path: module:{name.split('.')[-1]}.py:FUNCTION." if absent else ""
        raise ModelLoadError(f"cannot import {name}: {type(error).__name__}: {error}.{hint}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelLoadError(f"there is no file {path}. Write {_FORM}.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ModelLoadError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, name: str) -> Any:
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise UnknownName(f"{module.__name__} has no function {name!r}. {nearest(name, known)}")
    if not callable(getattr(module, name)):
        raise ConfigError(f"{module.__name__}:{name} is not a function")
    return getattr(module, name)


def _guarded(function: Any, spec: str) -> Callable[[Any], Any]:
    """The function, with whatever it raises turned into one ConfigError."""
    if not callable(function):
        raise ConfigError(f"{spec!r} is {type(function).__name__}, not a function")

    def call(items: Any) -> Any:
        try:
            rows = function(items)
        except DiffEffError:
            raise
        except Exception as error:  # anything: it is the user's code
            shape = list(items.shape) if isinstance(items, Tensor) else f"{len(items)} texts"
            raise ConfigError(f"{spec!r} failed on {shape}: {type(error).__name__}: {error}") from error
        return rows

    return call


def _probed(function: Callable[[Any], Tensor], spec: str, device: torch.device) -> int:
    """The length of a row, tried on two images and on one of them alone."""
    ramp = torch.arange(_SIDE).expand(3, _SIDE, _SIDE)
    pair = torch.stack([ramp, torch.full_like(ramp, 128)]).to(device, torch.uint8)
    with exactly():
        both, alone = function(pair), function(pair[:1])
    dim = _width(both, 2, spec)
    first = check_rows(alone, 1, dim, spec)
    if not torch.allclose(check_rows(both, 2, dim, spec)[:1], first, rtol=0, atol=0.01 * float(first.abs().max())):
        raise ConfigError(f"{spec!r}: an image's features change with its batch. Use eval mode and no random numbers.")
    return dim


def _width(rows: Any, count: int, spec: str) -> int:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != count or not rows.shape[1]:
        got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(f"features of {spec!r} must be a tensor [N, D], got {got} for N = {count}")
    return int(rows.shape[1])


def _label(function: Any, module: ModuleType) -> str:
    return f"{module.__name__}.{getattr(function, '__name__', type(function).__name__)}"


def _preparation(function: Any, spec: str) -> dict[str, Any]:
    told = getattr(function, "preparation", {})
    try:
        plain = json.loads(json.dumps(told))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{spec!r}: preparation must be made of JSON values: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{spec!r}: preparation must be a dictionary, got {type(told).__name__}")
    return plain


def _checksum(function: Any, module: ModuleType, preparation: Mapping[str, Any]) -> str:
    """Of the module's file, the file the function was written in, and what the function says of itself."""
    digest = hashlib.sha256()
    for path in sorted({path for path in (module.__file__, _written_in(function)) if path and Path(path).is_file()}):
        digest.update(Path(path).read_bytes())
    told = [_label(function, module), str(getattr(function, "sha256", "")), preparation]
    digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def _written_in(function: Any) -> str | None:
    try:
        return inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:  # built in
        return None
