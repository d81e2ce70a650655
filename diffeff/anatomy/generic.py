"""A description guessed from what diffusers itself says of a transformer's blocks, for classes without a family file.

Two sources: the block registry behind diffusers' own caches (private, so it may be missing), which knows where a
block's streams are; and the block classes a model names for compilation and for splitting over devices
(`_repeated_blocks`, `_no_split_modules`), which are taken when their forward is annotated to return one tensor. What
these cannot tell stays open: guidance is unknown, no attention has a grid.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffeff.anatomy.block_io import Slot, TokenIO, parameters, unwrap
from diffeff.anatomy.build import block_site
from diffeff.anatomy.types import CFG, AttentionKind, BlockSite, DenoiserMap

__all__ = ["guess"]

# Names that mean batch rows in every denoiser of diffusers that has them.
_ROWS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "guidance",
    "attention_mask",
    "class_labels",
)


@dataclass(frozen=True)
class _Run:
    """One list of blocks that diffusers knows."""

    path: str
    blocks: tuple[nn.Module, ...]
    io: TokenIO

    @property
    def layout(self) -> tuple[bool, int, int]:
        return self.io.text is not None, self.io.image_at, self.io.text_at


def guess(module: nn.Module, name: str) -> tuple[DenoiserMap | None, str]:
    """The description of a denoiser that has no family file; or None and the reason why it cannot be guessed."""
    signature = parameters(module)
    if "hidden_states" not in signature or "timestep" not in signature:
        return None, "its forward does not take hidden_states and timestep"
    runs = _runs(module)
    if not runs:
        return None, "diffusers has no metadata for its blocks"
    twins = _twins(runs)
    if twins:
        return None, f"{twins} hold the same blocks and may run in turn, so no list of them is one stack"
    kept, left = _choose(runs)
    listed = f"left out of the stack: {', '.join(run.path for run in left)}" if left else "all lists of blocks are used"
    described = DenoiserMap(
        name=name,
        module=module,
        family=type(module).__name__,
        blocks=_sites(kept),
        cfg=CFG.UNKNOWN,
        residual=True,
        signature=signature,
        text="encoder_hidden_states" if "encoder_hidden_states" in signature else None,
        rows=tuple(row for row in _ROWS if row in signature),
        generic=True,
        notes=(f"Guessed from diffusers' block metadata; {listed}.",),
    )
    return described, ""


def _runs(module: nn.Module) -> list[_Run]:
    found = []
    for path, child in module.named_children():
        if not isinstance(child, nn.ModuleList) or not len(child):
            continue
        ios = [_io(module, block) for block in child]
        io = ios[0]
        if io is not None and all(other == io for other in ios):
            found.append(_Run(path, tuple(child), io))
    return found


def _twins(runs: list[_Run]) -> str:
    """Lists of equally many blocks of one class, as in models that alternate between space and time."""
    seen: dict[tuple[type, int], str] = {}
    for run in runs:
        key = (type(unwrap(run.blocks[0])), len(run.blocks))
        if key in seen and len(run.blocks) > 1:
            return f"{seen[key]} and {run.path}"
        seen[key] = run.path
    return ""


def _choose(runs: list[_Run]) -> tuple[list[_Run], list[_Run]]:
    """The lists that make up the stack, and the others.

    Of lists with blocks of the same class the longest is the stack and the rest prepare its input (refiners). Lists
    of other classes belong to it when they carry the same streams, as Flux's double and single blocks do.
    """
    longest: dict[type, _Run] = {}
    for run in runs:
        cls = type(unwrap(run.blocks[0]))
        if cls not in longest or len(run.blocks) > len(longest[cls].blocks):
            longest[cls] = run
    main = max(longest.values(), key=lambda run: len(run.blocks))
    kept = [run for run in longest.values() if run.layout == main.layout]
    return kept, [run for run in runs if run not in kept]


def _sites(runs: list[_Run]) -> tuple[BlockSite, ...]:
    sites: list[BlockSite] = []
    for run in runs:
        joint = run.io.text is not None
        for number, block in enumerate(run.blocks):
            kind = _joint_kind if joint else _kind
            sites.append(block_site(f"{run.path}.{number}", block, len(sites), run.path, run.io, kind))
    return tuple(sites)


def _kind(path: str, attention: Any) -> AttentionKind:
    cross = getattr(attention, "is_cross_attention", False) or path.endswith("attn2")
    return "cross" if cross else "self"


def _joint_kind(path: str, attention: Any) -> AttentionKind:
    return "joint"


def _io(module: nn.Module, block: nn.Module) -> TokenIO | None:
    metadata = _metadata(type(unwrap(block)))
    names = parameters(block)
    if metadata is not None:
        image = getattr(metadata, "hidden_states_argument_name", "hidden_states")
        text = getattr(metadata, "encoder_hidden_states_argument_name", "encoder_hidden_states")
        text_at = metadata.return_encoder_hidden_states_index
        if image not in names or (text_at is not None and text not in names):
            return None
        slot = None if text_at is None else Slot.of(block, text)
        return TokenIO(Slot.of(block, image), slot, metadata.return_hidden_states_index or 0, text_at or 0)
    if type(unwrap(block)).__name__ in _named_blocks(module) and "hidden_states" in names and _returns_tensor(block):
        return TokenIO(Slot.of(block, "hidden_states"))
    return None


def _named_blocks(module: nn.Module) -> set[str]:
    lists = (getattr(module, attribute, None) or () for attribute in ("_repeated_blocks", "_no_split_modules"))
    return {name for names in lists for name in names}


def _returns_tensor(block: nn.Module) -> bool:
    annotation = inspect.signature(type(unwrap(block)).forward).return_annotation
    return annotation in ("torch.Tensor", "Tensor") or getattr(annotation, "__name__", "") == "Tensor"


def _metadata(cls: type) -> Any | None:
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:  # private: other releases have it elsewhere or not at all
        return None
    try:
        return TransformerBlockRegistry.get(cls)
    except (ValueError, ImportError):
        return None
