"""Every denoiser class diffeff knows, and where its anatomy lives.

A new family is one file and one line here. Files are imported only when their class is met.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from diffeff.anatomy.block_io import unwrap
from diffeff.anatomy.build import Anatomy
from diffeff.anatomy.types import DenoiserMap
from diffeff.errors import UnsupportedModel

__all__ = ["TABLE", "FamilyRow", "denoisers", "describe", "families"]

TABLE: dict[str, str] = {
    "WanTransformer3DModel": "diffeff.anatomy.wan:WAN",
    "WanVACETransformer3DModel": "diffeff.anatomy.wan:WAN_VACE",
    "CogVideoXTransformer3DModel": "diffeff.anatomy.cogvideox:COGVIDEOX",
    "LTXVideoTransformer3DModel": "diffeff.anatomy.ltx:LTX",
    "HunyuanVideoTransformer3DModel": "diffeff.anatomy.hunyuanvideo:HUNYUANVIDEO",
    "FluxTransformer2DModel": "diffeff.anatomy.flux:FLUX",
    "SD3Transformer2DModel": "diffeff.anatomy.sd3:SD3",
    "PixArtTransformer2DModel": "diffeff.anatomy.pixart:PIXART",
    "DiTTransformer2DModel": "diffeff.anatomy.dit:DIT",
    "UNet2DConditionModel": "diffeff.anatomy.unet2d:UNET2D",
    "UNetMotionModel": "diffeff.anatomy.unet_motion:UNET_MOTION",
    "UNetSpatioTemporalConditionModel": "diffeff.anatomy.unet_spatiotemporal:UNET_SPATIOTEMPORAL",
}

_ATTRIBUTES = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class FamilyRow:
    """One line of the list of families in README and docs."""

    family: str
    title: str
    classes: str
    guidance: str


def families() -> tuple[FamilyRow, ...]:
    """The known families, in the order of the table."""
    found = {path: _load(path) for path in TABLE.values()}
    return tuple(FamilyRow(a.family, a.title, ", ".join(a.classes), a.cfg.value) for a in found.values())


def describe(module: nn.Module, name: str = "transformer") -> DenoiserMap:
    """Describe one denoiser; `name` is the pipeline's attribute it came from.

    A class that is not in the table is described from diffusers' own block metadata, and marked generic, where that
    says enough. Raises UnsupportedModel, naming the known families, where it does not.
    """
    inner = unwrap(module)
    for cls in type(inner).__mro__:
        if cls.__name__ in TABLE:
            return _load(TABLE[cls.__name__]).describe(inner, name)
    from diffeff.anatomy.generic import guess

    guessed, reason = guess(inner, name)
    if guessed is None:
        raise UnsupportedModel(
            f"diffeff does not know the architecture {type(inner).__name__} ({name}), and it cannot be guessed: "
            f"{reason}. Known: {_known()}. Use one of these, or describe this one: one file in diffeff/anatomy and one "
            "line in its table.py."
        )
    return guessed


def denoisers(pipeline: Any) -> tuple[DenoiserMap, ...]:
    """Describe every denoiser of a pipeline, in the order in which it uses them (two for Wan 2.2).

    Raises UnsupportedModel when the pipeline has none, or one that is not known.
    """
    found: dict[int, DenoiserMap] = {}
    for name in _ATTRIBUTES:
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module) and id(unwrap(module)) not in found:
            found[id(unwrap(module))] = describe(module, name)
    if not found:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no denoiser that diffeff can find (none of {', '.join(_ATTRIBUTES)} is a "
            f"loaded module). Known: {_known()}."
        )
    return tuple(found.values())


def _load(path: str) -> Anatomy:
    module, attribute = path.split(":")
    found: Anatomy = getattr(import_module(module), attribute)
    return found


def _known() -> str:
    return "; ".join(f"{row.family} ({row.classes})" for row in families())
