"""What every family file is built from: discovery of attentions, and the two kinds of anatomy.

A family file holds one `TransformerAnatomy` or `UNetAnatomy` value and at most one small function (the grid of its
image tokens). Adding a family touches that file and one line of `table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from diffeff.anatomy.block_io import Slot, TokenIO, UNetDownIO, UNetMidIO, UNetUpIO, parameters
from diffeff.anatomy.types import (
    CFG,
    AttentionKind,
    AttentionSite,
    BlockIO,
    BlockSite,
    DenoiserMap,
    Grid,
    TextPadding,
)

__all__ = [
    "Anatomy",
    "Stack",
    "TransformerAnatomy",
    "UNetAnatomy",
    "attention_modules",
    "block_site",
    "head_dim",
]

TokenGrid = Callable[[Any, Mapping[str, Any]], "tuple[int, int, int] | None"]
"""(config, the denoiser's arguments by name) -> frames, height, width of its image tokens."""


# --- discovery ----------------------------------------------------------------------------------------------------
def attention_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path inside the block, module) of every attention, outermost only."""
    for name, child in block.named_children():
        if hasattr(child, "heads") and hasattr(child, "to_q"):
            yield name, child
        else:
            yield from ((f"{name}.{path}", found) for path, found in attention_modules(child))


def _feed_forwards(block: nn.Module) -> Iterator[str]:
    for name, child in block.named_children():
        if type(child).__name__.endswith("FeedForward"):
            yield name
        else:
            yield from (f"{name}.{path}" for path in _feed_forwards(child))


def head_dim(attention: Any) -> int:
    """Channels of one head."""
    width = getattr(attention, "inner_dim", None) or attention.to_q.out_features
    return int(width) // int(attention.heads)


KindOf = Callable[[str, nn.Module], "AttentionKind | None"]


def block_site(name: str, block: nn.Module, index: int, group: str, io: BlockIO, kind_of: KindOf) -> BlockSite:
    """One block with the attentions for which `kind_of(path inside the block, module)` knows a kind."""
    sites = tuple(
        AttentionSite(f"{name}.{path}", module, kind, int(module.heads), head_dim(module), index)  # type: ignore[arg-type]
        for path, module in attention_modules(block)
        if (kind := kind_of(path, module)) is not None
    )
    return BlockSite(name, block, index, group, io, sites, tuple(f"{name}.{path}" for path in _feed_forwards(block)))


# --- anatomies ----------------------------------------------------------------------------------------------------
class Anatomy(Protocol):
    """The description of one family of denoisers, before it is applied to a module."""

    @property
    def family(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def cfg(self) -> CFG: ...

    def describe(self, module: nn.Module, name: str) -> DenoiserMap:
        """The map of one denoiser; `name` is the pipeline's attribute."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other: where it is, and the order of the streams its blocks return."""

    path: str
    group: str = "block"
    returns: tuple[Literal["image", "text"], ...] = ("image",)

    def io(self, block: nn.Module) -> TokenIO:
        """How to read one of its blocks. Raises UnsupportedModel when the block's forward lacks a stream."""
        image = Slot.of(block, "hidden_states")
        if "text" not in self.returns:
            return TokenIO(image)
        text = Slot.of(block, "encoder_hidden_states")
        return TokenIO(image, text, self.returns.index("image"), self.returns.index("text"))


@dataclass(frozen=True)
class TransformerAnatomy:
    """A family of diffusion transformers. `stacks` are in order of execution; `attentions` gives the kind of each
    attention by its name in the block; `rows` may name arguments that only some of the classes have."""

    family: str
    title: str
    classes: tuple[str, ...]
    stacks: tuple[Stack, ...]
    attentions: Mapping[str, AttentionKind]
    rows: tuple[str, ...]
    cfg: CFG
    grid: TokenGrid
    text_first: bool = True
    sample: str = "hidden_states"
    timestep: str = "timestep"
    text: str | None = "encoder_hidden_states"
    guided: Callable[[Any, Mapping[str, Any]], bool] | None = None
    """Whether a call with these arguments carries both guidance branches, from the model's config; None where the
    batch of the latents tells."""
    padding: TextPadding = TextPadding.KEPT
    notes: tuple[str, ...] = ()

    def describe(self, module: nn.Module, name: str) -> DenoiserMap:
        """The map of one denoiser. Raises UnsupportedModel when the installed class differs from what is described."""
        signature = parameters(module)
        return DenoiserMap(
            name=name,
            module=module,
            family=self.family,
            blocks=tuple(self._blocks(module)),
            cfg=self.cfg,
            residual=True,
            signature=signature,
            guided=None if self.guided is None else partial(self.guided, module.config),
            sample=self.sample,
            timestep=self.timestep,
            text=self.text,
            rows=tuple(row for row in self.rows if row in signature),
            grid=partial(self._grid, module),
            padding=self.padding,
            notes=self.notes,
        )

    def _blocks(self, module: nn.Module) -> Iterator[BlockSite]:
        index = 0
        for stack in self.stacks:
            stacked: Any = module.get_submodule(stack.path)
            for number, block in enumerate(stacked):
                name = f"{stack.path}.{number}"
                yield block_site(name, block, index, stack.group, stack.io(block), self._kind)
                index += 1

    def _kind(self, path: str, attention: nn.Module) -> AttentionKind | None:
        return self.attentions.get(path.rpartition(".")[2])

    def _grid(self, module: Any, site: AttentionSite, tokens: int, arguments: Mapping[str, Any]) -> Grid | None:
        size = self.grid(module.config, arguments) if site.kind in ("self", "joint") else None
        if size is None:
            return None
        text = tokens - size[0] * size[1] * size[2]
        if site.kind == "self":
            return Grid(*size) if text == 0 else None
        prompt = arguments.get(self.text or "")
        # Anything but the prompt's own length means tokens that we cannot place (references, merged tokens).
        known = isinstance(prompt, Tensor) and prompt.shape[1] == text
        return Grid(*size, text=text, text_first=self.text_first) if known else None


@dataclass(frozen=True)
class UNetAnatomy:
    """A family of UNets: down blocks, mid block, up blocks. Attentions below a module called like one of `temporal`
    run over frames, all others over the pixels of one frame."""

    family: str
    title: str
    classes: tuple[str, ...]
    rows: tuple[str, ...]
    cfg: CFG = CFG.BATCHED_UNCOND_FIRST
    temporal: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self, module: nn.Module, name: str) -> DenoiserMap:
        """The map of one denoiser. Raises UnsupportedModel when the installed class differs from what is described."""
        signature = parameters(module)
        return DenoiserMap(
            name=name,
            module=module,
            family=self.family,
            blocks=tuple(self._blocks(module)),
            cfg=self.cfg,
            residual=False,
            signature=signature,
            sample="sample",
            rows=tuple(row for row in self.rows if row in signature),
            grid=_pixel_grid,
            notes=self.notes,
        )

    def _blocks(self, module: Any) -> Iterator[BlockSite]:
        # Distilled UNets come without a mid block.
        mid = [] if module.mid_block is None else [("mid_block", "mid", module.mid_block, UNetMidIO)]
        blocks: list[tuple[str, str, nn.Module, Callable[[Slot], BlockIO]]] = [
            *((f"down_blocks.{i}", "down", block, UNetDownIO) for i, block in enumerate(module.down_blocks)),
            *mid,
            *((f"up_blocks.{i}", "up", block, UNetUpIO) for i, block in enumerate(module.up_blocks)),
        ]
        for index, (name, group, block, io) in enumerate(blocks):
            yield block_site(name, block, index, group, io(Slot.of(block, "hidden_states")), self._kind)

    def _kind(self, path: str, attention: Any) -> AttentionKind | None:
        if attention.is_cross_attention:
            return "cross"
        return "temporal" if any(part in path.split(".") for part in self.temporal) else "self"


def _pixel_grid(site: AttentionSite, tokens: int, arguments: Mapping[str, Any]) -> Grid | None:
    """The level of the UNet that has this many pixels; each level halves the one above, rounding up."""
    if site.kind != "self":
        return None
    height, width = (int(n) for n in arguments["sample"].shape[-2:])
    while height * width > max(tokens, 1):
        height, width = -(-height // 2), -(-width // 2)
    return Grid(1, height, width) if height * width == tokens else None
