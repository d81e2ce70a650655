"""The vocabulary in which a denoiser is described: streams, sites, segments, grid.

An anatomy turns one diffusers model class into these values; the core installs seams at the sites; methods see
nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from diffeff.errors import ConfigError, MethodInapplicable

__all__ = [
    "CFG",
    "AttentionKind",
    "AttentionSite",
    "BlockIO",
    "BlockSite",
    "DenoiserMap",
    "Grid",
    "Memo",
    "ModuleKind",
    "ModuleSite",
    "Segment",
    "Streams",
    "TextPadding",
    "deep_segment",
]

AttentionKind = Literal["self", "cross", "joint", "temporal"]
ModuleKind = Literal["self", "cross", "joint", "temporal", "feed_forward"]


class CFG(Enum):
    """How a pipeline of this family feeds classifier-free guidance to the denoiser."""

    BATCHED_UNCOND_FIRST = "batched, unconditional rows first"
    BATCHED_COND_FIRST = "batched, conditional rows first"
    SEPARATE = "one call per branch, conditional first"
    DISTILLED = "guidance is an input of the model; one call, or one per branch with true CFG"
    UNKNOWN = "not known"


class TextPadding(Enum):
    """What stands behind the prompt in the text a denoiser of this family is given."""

    KEPT = "as a part of the text"
    ALIKE = "as equal tokens"
    """The denoiser attends to it, but its tokens are all the same, and cross-attention alone reads them."""
    MASKED = "under a mask"
    """Cross-attention alone reads the text, and leaves out what `encoder_attention_mask` says."""


@dataclass(frozen=True)
class Grid:
    """Where the tokens of an attention sequence sit: `frames x height x width` image tokens and `text` tokens.

    `text_first` says whether the text tokens come before the image tokens in a joint sequence.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = True

    @property
    def image_tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Streams:
    """The two streams of a block: image tokens (or feature map) and, where the block updates it, text tokens."""

    image: Tensor
    text: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Streams:
        return Streams(fn(self.image), None if self.text is None else fn(self.text))

    def __sub__(self, other: Streams) -> Streams:
        text = None if self.text is None or other.text is None else self.text - other.text
        return Streams(self.image - other.image, text)


@dataclass(frozen=True)
class Memo:
    """Shapes of what a block returned when it was computed, so that a stand-in can be made when it is skipped."""

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device


class BlockIO(Protocol):
    """How to read and write the streams of one block class. `args`, `kwargs` are those of the block's forward."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """The streams a block is called with."""

    def replace(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], streams: Streams
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other streams."""

    def outputs(self, result: Any) -> Streams:
        """The streams in a block's result."""

    def write(self, streams: Streams, result: Any | None = None) -> Any:
        """A block result that carries `streams`; what else `result` holds (skip connections) is kept."""

    def memo(self, result: Any) -> Memo | None:
        """What `skipped` will need, taken from a computed result; None where the inputs say it all."""

    def skipped(self, streams: Streams, memo: Memo | None) -> Any:
        """A block result for a block that is not computed: the input passed on, or shape-true stand-ins."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention module. `name` is its path inside the denoiser."""

    name: str
    module: nn.Module = field(repr=False, compare=False)
    kind: AttentionKind
    heads: int
    head_dim: int
    block: int
    """Index of the block it belongs to."""


@dataclass(frozen=True)
class ModuleSite:
    """One attention or feed-forward module as a whole: its output is added to a stream, often behind a gate."""

    name: str
    module: nn.Module = field(repr=False, compare=False)
    kind: ModuleKind
    block: int
    """Index of the block it belongs to."""


@dataclass(frozen=True)
class BlockSite:
    """One block of the denoiser's main stack, in order of execution."""

    name: str
    module: nn.Module = field(repr=False, compare=False)
    index: int
    group: str
    io: BlockIO = field(repr=False, compare=False)
    attentions: tuple[AttentionSite, ...] = ()
    feed_forward: tuple[str, ...] = ()
    """Paths (inside the denoiser) of its feed-forward modules."""
    share: float = 1.0
    """How much of a block it is: layers of a UNet's block stand in for a part of it."""


@dataclass(frozen=True)
class Segment:
    """A run of consecutive blocks that may be skipped whole.

    `residual` says whether input and output have the same shape, so that a prediction may be relative to the input.
    """

    denoiser: str
    blocks: tuple[BlockSite, ...]
    residual: bool

    @property
    def name(self) -> str:
        return f"{self.denoiser}.{self.blocks[0].name}..{self.blocks[-1].name}"


@dataclass(frozen=True)
class DenoiserMap:
    """The description of one denoiser: all that core and methods know of it.

    `sample`, `timestep`, `text` are the names of its forward arguments; `rows` names every argument whose dimension 0
    counts batch rows (dicts and tuples of such tensors included; a dimension that is a multiple of the batch holds
    that many consecutive entries per row).
    """

    name: str
    """The pipeline's attribute: unet, transformer, transformer_2, ..."""
    module: nn.Module = field(repr=False, compare=False)
    family: str
    blocks: tuple[BlockSite, ...] = field(repr=False)
    cfg: CFG
    residual: bool
    """Whether every block keeps the shape of its streams (transformers), or not (UNets)."""
    signature: tuple[str, ...] = field(repr=False)
    """Names of the forward's parameters in order, without self."""
    sample: str = "hidden_states"
    timestep: str = "timestep"
    text: str | None = "encoder_hidden_states"
    rows: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")
    grid: Callable[[AttentionSite, int, Mapping[str, Any]], Grid | None] = field(
        default=lambda site, tokens, arguments: None, repr=False, compare=False
    )
    """Grid of one attention site, from its query length and the denoiser's arguments by name; None if unknown."""
    guided: Callable[[Mapping[str, Any]], bool] | None = field(default=None, repr=False, compare=False)
    """Whether a call, given its arguments by name, carries both guidance branches; None where the batch of the latents
    tells (nearly everywhere)."""
    padding: TextPadding = TextPadding.KEPT
    generic: bool = False
    """True when the description was guessed from diffusers' block metadata, not written for this family."""
    notes: tuple[str, ...] = ()

    @property
    def attentions(self) -> tuple[AttentionSite, ...]:
        return tuple(site for block in self.blocks for site in block.attentions)

    @property
    def modules(self) -> tuple[ModuleSite, ...]:
        """Every attention and feed-forward module, block by block."""
        return tuple(site for block in self.blocks for site in self._modules(block))

    def _modules(self, block: BlockSite) -> Iterator[ModuleSite]:
        yield from (ModuleSite(a.name, a.module, a.kind, block.index) for a in block.attentions)
        for path in block.feed_forward:
            yield ModuleSite(path, self.module.get_submodule(path), "feed_forward", block.index)

    def segment(self, first: int = 0, last: int | None = None) -> Segment:
        """Blocks `first` to `last` (inclusive; negative counts from the end) as one segment."""
        stop = len(self.blocks) - 1 if last is None else last % len(self.blocks)
        return Segment(self.name, self.blocks[first : stop + 1], self.residual)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Value of the denoiser's forward argument `name` in a call; None when it was not given."""
        if name in kwargs:
            return kwargs[name]
        position = self.signature.index(name) if name in self.signature else len(args)
        return args[position] if position < len(args) else None


def deep_segment(denoiser: DenoiserMap, depth: int) -> Segment:
    """The deep part of a UNet, which changes slowly from step to step: all but the `depth` outermost down and up
    blocks. Its output is that of its last up block (of the mid block when `depth` leaves no other).

    Raises MethodInapplicable for a denoiser that is no UNet, ConfigError for a depth outside 1 to its levels.
    """
    groups = [block.group for block in denoiser.blocks]
    levels = groups.count("down")
    if not levels or groups.count("up") != levels:
        raise MethodInapplicable(
            f"{denoiser.name} ({denoiser.family}) has no down and up blocks, so no deep part. Use a segment of blocks."
        )
    deepest = levels if "mid" in groups else levels - 1
    if not 1 <= depth <= deepest:
        raise ConfigError(f"depth is {depth}; allowed for {denoiser.name} ({levels} levels): 1 to {deepest}")
    return Segment(denoiser.name, denoiser.blocks[depth : len(groups) - depth], residual=False)
