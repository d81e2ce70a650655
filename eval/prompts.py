"""Prompt sets: built-in ones, and files as people have them (txt, csv, tsv, jsonl, json, COCO captions)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from diffeff.errors import ConfigError, UnknownName, nearest
from diffeff.eval import records
from diffeff.eval.records import Record, RecordError

if TYPE_CHECKING:
    from diffeff.zoo.world import Scene

__all__ = ["BUILT_IN", "SUFFIXES", "Prompt", "PromptSet", "load_prompts"]

BUILT_IN: Mapping[str, str] = {
    "sprites": "the 200 captions of the bundled world that its models never saw in training",
    "sprites-stills": "the part of those captions that one frame shows, for models of single images",
    "general": "200 prompts of our own in ten categories, for models of any kind",
}

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json")

_GENERAL = Path(__file__).parent / "prompts" / "general.txt"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. It is generated at seed `base seed + seed_offset`; by default the offset is its place in the set.

    `scene` is set when the text is a caption of the bundled world, whose result can be read back from the pixels.
    """

    text: str
    scene: Scene | None = None
    seed_offset: int = 0
    category: str | None = None


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in a fixed order. `sha256` is that of texts and seed offsets: equal sets have it, whatever the file."""

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        return self.prompts[index]

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def scenes(self) -> list[Scene] | None:
        """The scenes of all prompts, or None when one of them is no caption of the bundled world."""
        found = [prompt.scene for prompt in self.prompts if prompt.scene is not None]
        return found if len(found) == len(self.prompts) else None

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for a report."""
        return {"name": self.name, "sha256": self.sha256, "n": len(self)}


def load_prompts(source: str, limit: int | None = None) -> PromptSet:
    """A built-in set by its name (see BUILT_IN), or the prompts of a file; the first `limit` of them.

    - .txt: one prompt per line; blank lines are skipped, a line that starts with `# ` names a category.
    - .csv, .tsv, .jsonl: a column `prompt`, `caption` or `text`; `seed` (an offset) and `category` if there.
    - .json: a list of texts or of such objects, or COCO captions (the first caption of every image).

    Raises UnknownName for what is neither a name nor a file, RecordError (with the line) for a file that cannot be
    read as prompts, ConfigError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1, or left out for all prompts")
    name, rows = _open(source)
    prompts = tuple(_prompts(islice(rows, limit)))
    if not prompts:
        raise RecordError(f"{source} holds no prompt.")
    return PromptSet(name, _digest(prompts), prompts)


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt as a source gives it: the seed offset may be left open."""

    text: str
    seed: int | None = None
    category: str | None = None


def _open(source: str) -> tuple[str, Iterable[_Row]]:
    """The name of the set, and its rows."""
    if source == "general":
        return source, _txt(_GENERAL)
    if source in BUILT_IN:
        return source, _sprites(stills=source == "sprites-stills")
    path = Path(source)
    if not path.is_file():
        raise UnknownName(
            f"there is no file of prompts and no built-in set {source!r}. {nearest(source, BUILT_IN)} "
            f"A file may be {', '.join(SUFFIXES)}."
        )
    return path.name, _file(path)


def _sprites(*, stills: bool) -> Iterator[_Row]:
    from diffeff.zoo.world import HELD_OUT

    return (_Row(scene.still_caption if stills else scene.caption) for scene in HELD_OUT)


def _file(path: Path) -> Iterator[_Row]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(f"{path}: {suffix or 'no suffix'} is not known. {nearest(suffix, SUFFIXES)}")
    if suffix == ".txt":
        return _txt(path)
    return _json(path) if suffix == ".json" else (_row(record, where) for where, record in records.read(path))


def _txt(path: Path) -> Iterator[_Row]:
    category = None
    for line in records.read_text(path).splitlines():
        if line.startswith("# "):
            category = line[2:].strip() or None
        elif line.strip():
            yield _Row(line.strip(), category=category)


def _row(record: Record, where: str) -> _Row:
    prompt = records.text(record, records.PROMPT_COLUMNS, where)
    category = records.optional_text(record, ("category",), where)
    return _Row(prompt, records.integer(record, "seed", where), category)


def _json(path: Path) -> Iterator[_Row]:
    """A list, or COCO captions. Entries are counted from 1, as lines are."""
    text = records.read_text(path)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error}).") from error
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        data = _coco(data["annotations"], path)
    if not isinstance(data, list):
        raise RecordError(f"{path}: expected a list of prompts, or COCO captions with their list 'annotations'.")
    for place, entry in enumerate(data, 1):
        where = f"{path}, entry {place}"
        if not isinstance(entry, str | dict):
            raise RecordError(f"{where}: expected a text or an object, found {type(entry).__name__}.")
        record = {"prompt": entry} if isinstance(entry, str) else entry
        yield _row({str(key).lower(): value for key, value in record.items()}, where)


def _coco(annotations: Sequence[Any], path: Path) -> list[Any]:
    """One caption per image, as COCO-30k sets are made: the first one given, in the order of the file."""
    first: dict[Any, Any] = {}
    for place, entry in enumerate(annotations, 1):
        if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
            raise RecordError(f"{path}, annotation {place}: expected 'image_id' and 'caption', as in COCO captions.")
        first.setdefault(entry["image_id"], {"caption": entry["caption"]})
    return list(first.values())


def _prompts(rows: Iterable[_Row]) -> Iterator[Prompt]:
    for place, row in enumerate(rows):
        yield Prompt(row.text, _scene(row.text), place if row.seed is None else row.seed, row.category)


def _scene(text: str) -> Scene | None:
    """Importing the world costs torch: only texts that begin like its captions are worth it."""
    if not text.lower().startswith(("a ", "an ")):
        return None
    from diffeff.zoo.world import Scene

    try:
        return Scene.parse(text)
    except ValueError:
        return None


def _digest(prompts: Sequence[Prompt]) -> str:
    said = json.dumps([[prompt.text, prompt.seed_offset] for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(said.encode()).hexdigest()
