"""Blocks of UNets as groups of operators: spatial ones together on some rows, then temporal ones in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor

from diffeff.methods.memory.resnet import bare, resnet_rows
from diffeff.methods.memory.temporal import Slices, motion_module, spatiotemporal_transformer, temporal_resnet
from diffeff.methods.memory.unet_attention import Context, transformer_rows
from diffeff.methods.memory.unet_kept import Computed, Kept, Source, Stored, source_of

__all__ = ["Given", "Layer", "alone", "down", "layers_of", "mid", "up"]


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def _driver(function: FunctionT) -> FunctionT:
    """Mark what stays plain Python in a compiled UNet: the loops over slices. What they call is compiled."""
    driver: FunctionT = torch.compiler.disable(function, recursive=False)
    return driver


@dataclass(frozen=True)
class Given:
    """The arguments of one block, by name."""

    values: Mapping[str, Any]
    slices: Slices

    @property
    def hidden(self) -> Tensor:
        tensor: Tensor = self.values["hidden_states"]
        return tensor

    @property
    def temb(self) -> Tensor | None:
        return self.values.get("temb")

    @property
    def frames(self) -> int:
        return int(self.values.get("num_frames") or 1)

    @property
    def text_tokens(self) -> int:
        text = self.values.get("encoder_hidden_states")
        text = text[0] if isinstance(text, tuple) else text  # with an IP-Adapter: (text, images)
        return 0 if text is None else int(text.shape[1])

    def context(self, start: int, stop: int, rows: int) -> Context:
        """What the attentions are given for these rows."""
        v = self.values
        return Context(
            v.get("encoder_hidden_states"),
            v.get("attention_mask"),
            v.get("encoder_attention_mask"),
            v.get("cross_attention_kwargs") or {},
        ).take(start, stop, rows)


RowStep = Callable[[Tensor, int, int, Given], Tensor]
"""Rows `start` to `stop` of a feature map through one operator: (rows, start, stop, given)."""
WholeStep = Callable[[Tensor, Given], None]
"""One operator on the whole feature map, written into it."""


@dataclass(frozen=True)
class Layer:
    """Operators that run on the same rows as one group, and those that then run on all of them in place."""

    spatial: Sequence[RowStep]
    temporal: Sequence[WholeStep]
    channels: int
    """Of the group's output."""
    width: int
    """The most channels it works on."""


# --- operators ----------------------------------------------------------------------------------------------------
def _resnet(module: Any, x: Tensor, start: int, stop: int, given: Given) -> Tensor:
    temb = given.temb
    return resnet_rows(module, x, None if temb is None else temb[start:stop])


def _transformer(module: Any, rows: int, x: Tensor, start: int, stop: int, given: Given) -> Tensor:
    tokens = max(x.shape[2] * x.shape[3], given.text_tokens)  # deep down the text's keys and values are the larger ones
    for a, b in given.slices.attended(x.shape[0], tokens, x.shape[1]):
        context = given.context(start + a, start + b, rows)
        part = x[a:b]
        out = transformer_rows(module, part, context, given.slices.parts)
        if out is not part:
            part.copy_(out)
    return x


def _motion(module: Any, x: Tensor, given: Given) -> None:
    motion_module(module, x, given.frames, given.slices)


def _temporal_resnet(module: Any, x: Tensor, given: Given) -> None:
    images = given.values["image_only_indicator"]
    temporal_resnet(module.temporal_res_block, module.time_mixer, x, given.temb, images, given.slices)


def _spatiotemporal(module: Any, x: Tensor, given: Given) -> None:
    text, images = given.values["encoder_hidden_states"], given.values["image_only_indicator"]
    spatiotemporal_transformer(module, x, text, images, given.slices)


def layers_of(block: Any, rows: int) -> list[Layer]:
    """The groups of a block, in order. A temporal operator, or the end of a layer whose output is a skip connection,
    ends a group."""
    mid = not hasattr(block, "downsamplers") and not hasattr(block, "upsamplers")
    order: list[list[Any]] = [[bare(resnet)] for resnet in block.resnets]
    for name in ("attentions", "motion_modules"):
        for index, module in enumerate(getattr(block, name, None) or ()):
            order[index].append(bare(module))
    groups = [_split(modules, rows) for modules in order]
    return _merged(groups) if mid else groups


def _split(modules: Sequence[Any], rows: int) -> Layer:
    resnet = modules[0]
    spatial: list[RowStep] = []
    temporal: list[WholeStep] = []
    for module in modules:
        if isinstance(module, SpatioTemporalResBlock):
            resnet = module.spatial_res_block
            spatial.append(partial(_resnet, resnet))
            temporal.append(partial(_temporal_resnet, module))
        elif isinstance(module, TransformerSpatioTemporalModel):
            temporal.append(partial(_spatiotemporal, module))
        elif isinstance(module, AnimateDiffTransformer3D):
            temporal.append(partial(_motion, module))
        else:
            spatial.append(partial(_resnet, module) if module is resnet else partial(_transformer, module, rows))
    channels = getattr(resnet, "out_channels", None) or resnet.in_channels
    return Layer(spatial, temporal, channels, max(resnet.in_channels, channels))


def _merged(layers: Sequence[Layer]) -> list[Layer]:
    """Consecutive groups without a temporal operator between them, as one."""
    out: list[Layer] = []
    for layer in layers:
        if out and not out[-1].temporal:
            before = out.pop()
            spatial = [*before.spatial, *layer.spatial]
            layer = Layer(spatial, layer.temporal, layer.channels, max(before.width, layer.width))
        out.append(layer)
    return out


def alone(module: Any, given: Given) -> Tensor:
    """One layer's module by itself on slices, for blocks between whose layers someone else acts; a new tensor."""
    x = given.hidden
    rows, channels, *size = x.shape
    if isinstance(module, AnimateDiffTransformer3D | TransformerSpatioTemporalModel):
        out = x.clone()
        (step,) = _split([module], rows).temporal
        step(out, given)
        return out
    if isinstance(module, ResnetBlock2D | SpatioTemporalResBlock):
        return _run(_split([module], rows), lambda a, b: x[a:b], (rows, *size), None, given)
    layer = Layer([partial(_transformer, module, rows)], [], channels, channels)
    return _run(layer, lambda a, b: x[a:b].clone(), (rows, *size), None, given)


# --- blocks -------------------------------------------------------------------------------------------------------
@_driver
def _run(
    layer: Layer, read: Callable[[int, int], Tensor], size: Sequence[int], into: Tensor | None, given: Given
) -> Tensor:
    """One group: `read(start, stop)` gives the rows of its input; the output goes into `into` where that is given.

    `size`: rows, height and width of the output.
    """
    first, *others = given.slices.rows(size[0], size[1] * size[2], layer.width)
    x = _chain(layer, read, *first, given)
    if into is None and not others:
        out = x
    else:
        out = x.new_empty(size[0], *x.shape[1:]) if into is None else into
        out[slice(*first)] = x
    del x
    for start, stop in others:
        out[start:stop] = _chain(layer, read, start, stop, given)
    for whole in layer.temporal:
        whole(out, given)
    return out


@_driver
def _chain(layer: Layer, read: Callable[[int, int], Tensor], start: int, stop: int, given: Given) -> Tensor:
    """Some rows through all spatial operators of a group."""
    x = read(start, stop)
    for step in layer.spatial:
        x = step(x, start, stop, given)
    return x


@_driver
def down(block: Any, given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A down block. Every layer's output is a skip connection, so each is a new tensor; the downsampler's is not even
    that, but recomputed where it is read."""
    source, states = source_of(given.hidden), []
    layers = layers_of(block, source.shape[0])
    extra = given.values.get("additional_residuals")
    for index, layer in enumerate(layers):
        size = (source.shape[0], *source.shape[2:])
        out = _run(layer, source.rows, size, None, given)
        if extra is not None and index == len(layers) - 1:
            out = out.add_(extra) if extra.dtype is out.dtype else out + extra
        source = Stored(out, owned=True)
        states.append(Kept(source))
    for sampler in block.downsamplers or ():
        source = _downsampled(bare(sampler), source)
        states.append(Kept(source))
    return states[-1], tuple(states)


def _downsampled(sampler: Any, source: Source) -> Source:
    if type(sampler) is not Downsample2D or not sampler.use_conv:
        return Stored(sampler(source.whole()), owned=True)
    height, width = (_conv_size(side, sampler) for side in source.shape[2:])
    return Computed(sampler, source, (sampler.out_channels, height, width))


def _conv_size(side: int, sampler: Any) -> int:
    padded = side + (1 if sampler.padding == 0 else 2 * int(sampler.padding))  # padding 0 means one on the far side
    kernel, stride = sampler.conv.kernel_size[0], sampler.conv.stride[0]
    return int((padded - kernel) // stride + 1)


@_driver
def mid(block: Any, given: Given) -> Tensor:
    """The mid block: its first group's output is a new tensor, which the others overwrite."""
    source: Source = source_of(given.hidden)
    for index, layer in enumerate(layers_of(block, source.shape[0])):
        into = source.tensor if index and isinstance(source, Stored) else None
        size = (source.shape[0], *source.shape[2:])
        source = Stored(_run(layer, source.rows, size, into, given), owned=True)
    return Kept(source)


@_driver
def up(block: Any, given: Given) -> Tensor:
    """An up block. Reads [hidden, skip] row by row, writes over whichever of the two has the output's shape, and lets
    go of both. Upsampling waits for its reader."""
    hidden = source_of(given.hidden)
    skips = list(given.values["res_hidden_states_tuple"])
    freeu = _freeu(block)
    if isinstance(given.hidden, Kept):
        given.hidden.release()
    for layer in layers_of(block, hidden.shape[0]):
        skip = source_of(skips[-1])
        size = (hidden.shape[0], *hidden.shape[2:])
        into = _reusable((hidden, skip), (size[0], layer.channels, *size[1:]))
        out = _run(layer, partial(_joined, hidden, skip, freeu), size, into, given)
        hidden = Stored(out, owned=True)
        _drop(skips.pop())
        del skip, into
    for sampler in block.upsamplers or ():
        hidden = _upsampled(bare(sampler), hidden, given.values.get("upsample_size"))
    return Kept(hidden)


def _joined(hidden: Source, skip: Source, freeu: Callable[..., Any] | None, start: int, stop: int) -> Tensor:
    a, b = hidden.rows(start, stop), skip.rows(start, stop)
    if freeu is not None:
        a, b = freeu(hidden_states=a.clone(), res_hidden_states=b)
    return torch.cat([a, b], dim=1)


def _freeu(block: Any) -> Callable[..., Any] | None:
    scales: dict[str, Any] = {key: getattr(block, key, None) for key in ("s1", "s2", "b1", "b2")}
    return partial(apply_freeu, block.resolution_idx, **scales) if all(scales.values()) else None


def _reusable(sources: Sequence[Source], shape: tuple[int, ...]) -> Tensor | None:
    """The memory of the first of these that nobody else reads and that has the output's shape."""
    fitting = (source.spare() for source in sources if source.shape == shape)
    return next((spare for spare in fitting if spare is not None), None)


def _drop(skip: Tensor) -> None:
    if isinstance(skip, Kept):
        skip.release()


def _upsampled(sampler: Any, source: Source, size: Any) -> Source:
    plain = type(sampler) is Upsample2D and sampler.use_conv and not sampler.use_conv_transpose and sampler.interpolate
    if not plain:
        return Stored(sampler(source.whole(), size), owned=True)
    height, width = size if size is not None else (2 * side for side in source.shape[2:])
    shape = (sampler.out_channels, int(height), int(width))
    return Computed(partial(_upsample, sampler, size), source, shape)


def _upsample(sampler: Any, size: Any, rows: Tensor) -> Tensor:
    result: Tensor = sampler(rows, size)
    return result
