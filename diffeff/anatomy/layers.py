"""The deep part of a UNet cut between the layers of a block: finer than whole blocks, so that less is computed anew.

A layer of a block is a resnet with the attention and motion module behind it. The cut runs beside a skip connection:
what is computed outside the deep part needs nothing of what is inside, but the one feature map that it puts out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from diffeff.anatomy.block_io import Slot, UNetUpIO, parameters
from diffeff.anatomy.types import BlockSite, DenoiserMap, Segment, Streams
from diffeff.errors import ConfigError, MethodInapplicable

__all__ = ["MapIO", "deep_layers", "layer_count"]

_PARTS = ("resnets", "attentions", "motion_modules")
"""Module lists of a block, in order of execution within a layer."""


@dataclass(frozen=True)
class MapIO(UNetUpIO):
    """A module of a UNet's block: a feature map in, one out, bare or as the first of a tuple."""

    wrapped: bool = False

    def outputs(self, result: Any) -> Streams:
        """The feature map a module returns."""
        return Streams(result if isinstance(result, Tensor) else result[0])

    def write(self, streams: Streams, result: Any | None = None) -> Any:
        """The feature map as the block expects it."""
        return (streams.image,) if self.wrapped else streams.image

    def memo(self, result: Any) -> Any:
        """The shape of the feature map."""
        return super().memo(result if isinstance(result, Tensor) else result[0])

    def skipped(self, streams: Streams, memo: Any) -> Any:
        """Zeros that take no memory. Raises ValueError when the module was never computed at this size."""
        return self.write(Streams(super().skipped(streams, memo)))


def layer_count(denoiser: DenoiserMap, level: int) -> int:
    """Layers of the up block at `level`, 0 being the outermost."""
    return len(_layers(denoiser.blocks[len(denoiser.blocks) - 1 - level]))


def deep_layers(denoiser: DenoiserMap, level: int, layer: int = 0) -> Segment:
    """All that lies deeper than the cut at `level` (0: outermost blocks) and `layer` (0: the outermost layer).

    Outside the cut stay: the `layer` first layers of the down block at `level`, the `layer` + 1 last ones of its up
    block, and all blocks further out. With `after_frames`, the deep part ends behind a module that mixes frames.

    Raises MethodInapplicable for a denoiser that is no UNet, ConfigError for a cut that leaves nothing inside.
    """
    groups = [block.group for block in denoiser.blocks]
    levels = groups.count("down")
    if not levels or groups.count("up") != levels:
        raise MethodInapplicable(
            f"{denoiser.name} ({denoiser.family}) has no down and up blocks, so no deep part. Use a segment of blocks."
        )
    if not 0 <= level < levels:
        raise ConfigError(f"level is {level}; allowed for {denoiser.name}: 0 to {levels - 1}")
    down, up = denoiser.blocks[level], denoiser.blocks[len(groups) - 1 - level]
    most = len(_layers(up)) - 1
    if not 0 <= layer <= min(most, len(_layers(down))):
        raise ConfigError(f"layer is {layer}; allowed at level {level} of {denoiser.name}: 0 to {most}")
    inside = [
        *_inside_down(down, layer),
        *denoiser.blocks[level + 1 : len(groups) - 1 - level],
        *(site for own in _layers(up)[: most - layer] for site in own),
    ]
    if not {site.group for site in inside} & {"mid", "up"}:
        raise ConfigError(f"the cut at level {level}, layer {layer} of {denoiser.name} leaves nothing to predict")
    return Segment(denoiser.name, tuple(inside), residual=False)


def _inside_down(block: BlockSite, layer: int) -> list[BlockSite]:
    if layer == 0:
        return [block]
    own = [site for later in _layers(block)[layer:] for site in later]
    return [*own, *_sites(block, [("downsamplers", 0)])]


def _layers(block: BlockSite) -> list[list[BlockSite]]:
    """The block's layers, each as its modules in order of execution."""
    lists: Mapping[str, Any] = {name: getattr(block.module, name, None) or () for name in _PARTS}
    return [
        list(_sites(block, [(name, n) for name in _PARTS if n < len(lists[name])]))
        for n in range(len(lists["resnets"]))
    ]


def _sites(block: BlockSite, places: list[tuple[str, int]]) -> Iterator[BlockSite]:
    total = sum(len(getattr(block.module, name, None) or ()) for name in (*_PARTS, "downsamplers", "upsamplers"))
    for name, number in places:
        listed = getattr(block.module, name, None)
        if listed:
            module: nn.Module = listed[number]
            io = MapIO(Slot(parameters(module)[0], 0), "return_dict" in parameters(module))
            path = f"{block.name}.{name}.{number}"
            yield replace(block, name=path, module=module, io=io, attentions=(), feed_forward=(), share=1 / total)
