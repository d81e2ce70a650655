"""The two sides of an evaluation as flat lists: the items that are measured, and those they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffeff.errors import ConfigError
from diffeff.eval.append_log import digest
from diffeff.eval.generation import Made
from diffeff.eval.items import ItemSet, item_sha

__all__ = ["Entry", "content", "from_folder", "from_made", "paired"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One item: its file, the checksum that everything computed from it is kept under, and what belongs to it."""

    name: str
    path: Path
    sha256: str
    prompt: str | None = None
    latents: Path | None = None


def from_folder(items: ItemSet) -> tuple[Entry, ...]:
    """The items of a folder, each with the checksum of its file. Reads every file once."""
    return tuple(Entry(item.name, item.path, item_sha(item.path), item.prompt) for item in items)


def from_made(made: Iterable[Made]) -> tuple[Entry, ...]:
    """Clips that were generated."""
    return tuple(Entry(m.name, m.path, m.sha256, m.prompt, m.latents) for m in made)


def paired(subject: Sequence[Entry], reference: Sequence[Entry]) -> tuple[tuple[Entry, Entry], ...]:
    """Each subject item with the reference item of its name.

    Raises ConfigError when names are missing, with the first few of them.
    """
    known = {entry.name: entry for entry in reference}
    missing = [entry.name for entry in subject if entry.name not in known]
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigError(
            f"{len(missing)} of {len(subject)} items have no reference of the same name: {listed}. Metrics of "
            "pairs (psnr, ssim, ...) need one; name the files alike, or ask for set metrics only (fid, kid, ...)."
        )
    return tuple((entry, known[entry.name]) for entry in subject)


def content(entries: Sequence[Entry]) -> dict[str, Any]:
    """How many items there are, and one checksum over their contents in order, for a report."""
    return {"items": len(entries), "sha256": digest([entry.sha256 for entry in entries], 64)}


def same_names(subject: Sequence[Entry], reference: Sequence[Entry]) -> bool:
    """Whether every subject item has a partner."""
    names: Mapping[str, None] = dict.fromkeys(entry.name for entry in reference)
    return all(entry.name in names for entry in subject)
