"""Feature slicing for the UNets of diffusers: SD and SDXL, AnimateDiff, Stable Video Diffusion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffeff.anatomy.block_io import parameters
from diffeff.core.method import Undo
from diffeff.core.seams import Patch, Seam
from diffeff.errors import MethodInapplicable
from diffeff.methods.memory.budget import Share
from diffeff.methods.memory.temporal import Slices
from diffeff.methods.memory.unet_blocks import Given, alone, down, mid, up
from diffeff.methods.memory.unet_cuts import slices_for
from diffeff.methods.memory.unet_kept import Computed, Kept, Stored, real

__all__ = ["check_unet", "slice_unet"]

log = logging.getLogger("diffeff")
_RUNNERS: dict[str, Callable[[Any, Given], Any]] = {
    "DownBlock2D": down,
    "CrossAttnDownBlock2D": down,
    "DownBlockMotion": down,
    "CrossAttnDownBlockMotion": down,
    "DownBlockSpatioTemporal": down,
    "CrossAttnDownBlockSpatioTemporal": down,
    "UNetMidBlock2DCrossAttn": mid,
    "UNetMidBlockCrossAttnMotion": mid,
    "UNetMidBlockSpatioTemporal": mid,
    "UpBlock2D": up,
    "CrossAttnUpBlock2D": up,
    "UpBlockMotion": up,
    "CrossAttnUpBlockMotion": up,
    "UpBlockSpatioTemporal": up,
    "CrossAttnUpBlockSpatioTemporal": up,
}
_LAYERS = ("resnets", "attentions", "motion_modules")
_ALONE = frozenset(
    {
        "AnimateDiffTransformer3D",
        "ResnetBlock2D",
        "SpatioTemporalResBlock",
        "Transformer2DModel",
        "TransformerSpatioTemporalModel",
    }
)
"""Modules of a block's layers that can be sliced by themselves."""
_ROWWISE = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    }
)
"""Attention processors of diffusers that treat every batch row alone. Others (PAG, cross-frame attention) may not."""


def check_unet(module: nn.Module) -> None:
    """Raise MethodInapplicable when none of the UNet's blocks is of a known kind."""
    kinds = [type(block).__name__ for block in _blocks(module)]
    if not any(kind in _RUNNERS for kind in kinds):
        raise MethodInapplicable(
            f"feature_slicing knows no block of this {type(module).__name__} (it has {', '.join(sorted(set(kinds)))}). "
            f"Known: {', '.join(_RUNNERS)}."
        )


def slice_unet(model: nn.Module, share: Share) -> Undo:
    """Make a UNet run in slices that fit `share`, with the same result; returns the exact undo.

    Acts without gradients only (with them the plain forward runs). Raises MethodInapplicable for unknown blocks.
    """
    check_unet(model)
    with ExitStack() as stack:
        _SlicedUNet(model, share, stack)
        return stack.pop_all().close


def _blocks(unet: Any) -> list[nn.Module]:
    mid_block = [] if unet.mid_block is None else [unet.mid_block]
    return [*unet.down_blocks, *mid_block, *unet.up_blocks]


class _SlicedUNet:
    """The seams of one UNet: its forward opens a pass, in which its input convolution and its blocks run in slices."""

    def __init__(self, unet: Any, share: Share, stack: ExitStack) -> None:
        self._unet = unet
        self._share = share
        self._slices: Slices | None = None
        self._patches: dict[nn.Module, Patch] = {}
        self._blocks = _blocks(unet)
        self._layered = False
        """Whether the block at work runs by its own forward, its layers' modules each on slices."""
        self._told: set[str] = set()
        for block in self._blocks:
            if type(block).__name__ in _RUNNERS:
                for module in _layer_modules(block):
                    self._put(stack, module, self._layer_handler(module))
                self._put(stack, block, self._block_handler(block))
        self._put(stack, unet.conv_in, self._conv_in)
        self._put(stack, unet, self._forward)

    def _put(self, stack: ExitStack, module: nn.Module, handler: Any) -> None:
        """Under the compiled call of a module compiled in place, so that the seam cuts its graph."""
        compiled = module.__dict__.pop("_compiled_call_impl", None)
        self._patches[module] = patch = Patch(module, "forward", handler)
        if compiled is not None:
            module.__dict__["_compiled_call_impl"] = compiled
        stack.callback(patch.undo)

    # --- seams --------------------------------------------------------------------------------------------------
    def _forward(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(parameters(self._unet), args, strict=False)) | kwargs
        if torch.is_grad_enabled() and self._differentiable(named):
            return inner(*args, **kwargs)
        self._slices = slices_for(self._unet, named["sample"], self._share)
        try:
            result = torch.compiler.disable(inner, recursive=False)(*args, **kwargs)
        finally:
            self._slices = None
        return tree_map_only(Kept, real, result)

    def _differentiable(self, named: Mapping[str, Any]) -> bool:
        tensors = [v for v in named.values() if isinstance(v, Tensor)]
        return any(t.requires_grad for t in (*tensors, *self._unet.parameters()))

    def _conv_in(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cheap to compute again, so its output is never stored."""
        if self._slices is None or self._exposed(0):
            return inner(*args, **kwargs)
        sample = Stored(args[0], owned=False)
        return Kept(Computed(inner, sample, (self._unet.config.block_out_channels[0], *sample.shape[2:])))

    def _block_handler(self, block: nn.Module) -> Any:
        index, run = self._blocks.index(block), _RUNNERS[type(block).__name__]

        def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._slices is None:
                return inner(*args, **kwargs)
            reason = _obstacle(block)
            if reason:
                self._tell(index, reason)
            self._layered = not reason and self._between(block)
            if reason or self._layered:
                args, kwargs = tree_map_only(Kept, real, (args, kwargs))
                return inner(*args, **kwargs)
            named = dict(zip(parameters(block), args, strict=False)) | kwargs
            return self._hand_over(index, run(block, Given(named, self._slices)))

        return handle

    def _layer_handler(self, module: nn.Module) -> Any:
        names = parameters(module)

        def handle(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._slices is None or not self._layered:
                return inner(*args, **kwargs)
            named = dict(zip(names, args, strict=False)) | kwargs
            out = alone(module, Given({**named, "hidden_states": named[names[0]]}, self._slices))
            return (out,) if "return_dict" in names else out

        return handle

    # --- who looks on -------------------------------------------------------------------------------------------
    def _hand_over(self, index: int, result: Any) -> Any:
        """A block's result as its readers need it: real tensors for those we do not know."""
        block = self._blocks[index]
        if _hooked(block) or not self._ours(block):
            return tree_map_only(Kept, real, result)
        if not (self._exposed(index) or self._exposed(index + 1)):
            return result
        return (real(result[0]), result[1]) if isinstance(result, tuple) else real(result)

    def _exposed(self, index: int) -> bool:
        """Whether someone else (a cache of blocks, a hook) looks at what goes in and out of this block."""
        if index >= len(self._blocks):
            return False
        block = self._blocks[index]
        patch = self._patches.get(block)
        return _hooked(block) or patch is None or block.__dict__.get(patch.slot() or "forward") is not patch.seam

    def _between(self, block: nn.Module) -> bool:
        """Whether a cache acts between the layers of this block, which then sees the whole of what goes in and out."""
        modules = [*_layer_modules(block), *(getattr(block, "downsamplers", None) or ())]
        tops = [(m.__dict__.get("forward"), self._patches.get(m)) for m in modules]
        return any(isinstance(top, Seam) and (own is None or top is not own.seam) for top, own in tops)

    def _ours(self, block: nn.Module) -> bool:
        """Whether only seams of diffeff sit on the block; they never look at skip connections."""
        patch = self._patches[block]
        return isinstance(block.__dict__.get(patch.slot() or "forward"), Seam)

    def _tell(self, index: int, reason: str) -> None:
        text = f"feature_slicing runs block {index} ({type(self._blocks[index]).__name__}) whole: {reason}"
        if text not in self._told:
            self._told.add(text)
            log.warning(text)


def _layer_modules(block: Any) -> list[nn.Module]:
    """The modules of a block's layers that can be sliced by themselves."""
    modules = [m for name in _LAYERS for m in getattr(block, name, None) or ()]
    return [m for m in modules if type(m).__name__ in _ALONE]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _obstacle(block: nn.Module) -> str:
    """Why a block has to run whole in this call; empty when nothing speaks against slices."""
    for name, module in block.named_modules():
        if module is not block and _hooked(module):
            return f"a forward hook is registered on its {name}"
        if isinstance(module, Attention):
            processor = type(module.processor)
            if processor.__name__ not in _ROWWISE and not processor.__module__.startswith("diffeff."):
                return f"{processor.__name__} of its {name} may look from one batch row at another"
    return ""
