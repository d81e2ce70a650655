"""Exact feature slicing: operators that share a slicing axis run as one group on one slice before the next.

Source: Feature Slicer and Operator Grouping of Streamlined Inference (arXiv 2411.01171). That form slices the width of
temporal modules through their group norms, which changes the result; here every norm sees the statistics of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method, Undo
from diffeff.core.run import Run
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.memory.budget import Share, parse_bytes

__all__ = ["FeatureSlicing"]

_UNETS = ("unet2d", "unet_motion", "unet_spatiotemporal")


@dataclass(frozen=True, kw_only=True)
class FeatureSlicing(Config):
    """Less activation memory at the same result and speed: a group of operators works on one slice at a time.

    Exact: outputs equal the unsliced ones up to the rounding of another order of summation (1e-6 of their size in
    float32). Weights, attention maps and the number of steps stay as they are.

    In UNets spatial operators run on some frames (and guidance halves), temporal ones on some pixels of all frames;
    skip connections that are cheap to recompute are, the others are overwritten by their reader. In transformers
    everything but the keys and values runs on some tokens. `memory` is the most the run may hold in all, weights
    included; left empty, slices are as small as models of released widths take without running measurably slower;
    models whose operators take microseconds do run slower.

    Source: Streamlined Inference (arXiv 2411.01171), its exact form.
    """

    name: ClassVar[str] = "feature_slicing"
    summary: ClassVar[str] = (
        "A fraction of the activation memory, exactly the same result: operators run slice by slice."
    )

    memory: str = knob("", "most bytes the run may hold, weights included ('8GB'); empty: smallest at no cost in time")
    slices: int = knob(0, "cut every group into this many slices; 0: as the memory asks for", low=0, step=1)
    vae: bool = knob(True, "slice the VAE's decoder and encoder as well")

    def check(self) -> None:
        if self.memory:
            parse_bytes(self.memory)
        if self.memory and self.slices:
            raise ConfigError(
                f"feature_slicing.memory is {self.memory!r} and slices is {self.slices}: the number of slices follows "
                "from the memory. Give one of them."
            )

    def build(self) -> FeatureSlicingMethod:
        return FeatureSlicingMethod(self)


class FeatureSlicingMethod(Method[FeatureSlicing]):
    """Rewrites the forwards of blocks on their instances at attach, and takes them off again at detach."""

    layer: ClassVar[Layer] = Layer.QUANTIZE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SLICES})

    def __init__(self, config: FeatureSlicing) -> None:
        super().__init__(config)
        self.share = Share(None, config.slices or None)
        self._vae = ""

    # --- attach -------------------------------------------------------------------------------------------------
    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        for denoiser in denoisers:
            _check(denoiser)

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        return f"all {len(denoiser.blocks)} blocks run in slices"

    def rewrite_pipeline(self, pipeline: Any) -> Undo | None:
        self.share = Share(self._activations(pipeline), self.config.slices or None)
        vae = getattr(pipeline, "vae", None)
        if not self.config.vae or vae is None:
            self._vae = ""
            return None
        from diffeff.methods.memory.vae import slice_vae

        sliced = slice_vae(vae, self.share)
        self._vae = f"; the VAE {'in exact slices' if sliced.exact else 'in slices that are not exact'} ({sliced.note})"
        undo: Undo = sliced.undo
        return undo

    def rewrite(self, denoiser: DenoiserMap) -> Undo | None:
        return _slicer(denoiser)(denoiser.module, self.share)

    def _activations(self, pipeline: Any) -> int | None:
        """Bytes that the weights leave of the memory; None without a limit. Raises ConfigError when none are left."""
        if not self.config.memory:
            return None
        weights, limit = _weight_bytes(pipeline), parse_bytes(self.config.memory)
        if weights >= limit:
            raise ConfigError(
                f"feature_slicing.memory is {self.config.memory!r} ({limit:,} bytes), but the weights of this "
                f"{type(pipeline).__name__} alone take {weights:,}. Give more, offload the model, or use lower "
                "precision weights."
            )
        return limit - weights

    # --- report -------------------------------------------------------------------------------------------------
    def engaged(self, run: Run) -> tuple[bool, str]:
        how = f"{self.config.slices} slices" if self.config.slices else "slices chosen by size"
        return True, f"blocks run in {how}{self._vae}"


def _check(denoiser: DenoiserMap) -> None:
    """Raise MethodInapplicable for a model whose operators' slicing axes are not known."""
    kind = type(denoiser.module).__name__
    if denoiser.family in _UNETS:
        from diffeff.methods.memory.unet import check_unet

        check_unet(denoiser.module)
    elif kind not in _transformers():
        raise MethodInapplicable(
            f"feature_slicing does not know which operators of {kind} ({denoiser.name}) share a slicing axis. Known: "
            f"the UNets of SD, SDXL, AnimateDiff and SVD, {', '.join(_transformers())}."
        )


def _transformers() -> Collection[str]:
    """The classes of transformers that can be sliced."""
    from diffeff.methods.memory.dit import FAMILIES

    return FAMILIES.keys()


def _slicer(denoiser: DenoiserMap) -> Callable[[nn.Module, Share], Undo]:
    if denoiser.family in _UNETS:
        from diffeff.methods.memory.unet import slice_unet

        return slice_unet
    from diffeff.methods.memory.dit import slice_dit

    slicer: Callable[[nn.Module, Share], Undo] = slice_dit
    return slicer


def _weight_bytes(pipeline: Any) -> int:
    """Bytes of the weights of all components, those that share storage counted once."""
    modules = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
    tensors = {t.data_ptr(): t.nbytes for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(tensors.values())
