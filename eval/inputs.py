"""What an evaluation's settings name, listed and checked: items, prompts, reference. No pixel is read yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffeff.errors import ConfigError
from diffeff.eval.choosing import Given
from diffeff.eval.generation import Shot
from diffeff.eval.items import ItemError, ItemSet, check_sizes, open_folder
from diffeff.eval.probing import Ability
from diffeff.eval.prompts import PromptSet, load_prompts
from diffeff.eval.settings import PLAIN, EvalSettings
from diffeff.eval.statistics import Statistics, load
from diffeff.zoo.world import Scene

__all__ = ["Inputs", "list_inputs"]


@dataclass(frozen=True)
class Inputs:
    """`items` of a folder, or None for a model, which then has `prompts`. `reference` is None when it is generated."""

    items: ItemSet | None
    prompts: PromptSet | None
    reference: ItemSet | Statistics | None
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str] | None:
        """The prompt of every item, or None when one has none."""
        if self.items is None:
            return self.prompts.texts if self.prompts else None
        found = [item.prompt for item in self.items]
        return [text for text in found if text] if all(found) else None

    @property
    def scenes(self) -> bool:
        """Whether every prompt is a caption of the bundled world."""
        return self.texts is not None and all(_is_caption(text) for text in self.texts)

    @property
    def about_prompts(self) -> dict[str, Any] | None:
        """The prompts, for a report."""
        if self.prompts is not None:
            return self.prompts.describe()
        if self.items is None or self.items.manifest is None:
            return None
        return {"name": self.items.manifest, "n": sum(item.prompt is not None for item in self.items)}

    def shots(self, seed: int) -> list[Shot]:
        """What a model has to make."""
        return [Shot.of(prompt.text, seed + prompt.seed_offset) for prompt in self.prompts or ()]

    def given(self, settings: EvalSettings, abilities: tuple[Ability, ...]) -> Given:
        """What metrics can be computed from."""
        generated = self.items is None and settings.plan is not None
        return Given(
            items=len(self.items if self.items is not None else self.prompts or ()),
            reference=generated or self.reference is not None or _kept(settings),
            pairs=generated or self._named_alike,
            latents=generated,
            prompts=self.texts is not None,
            scenes=self.scenes,
            abilities=abilities,
        )

    @property
    def _named_alike(self) -> bool:
        """Whether every item has a partner of its name in the reference folder."""
        if self.items is None or not isinstance(self.reference, ItemSet):
            return False
        return self.items.by_name.keys() <= self.reference.by_name.keys()


def list_inputs(settings: EvalSettings) -> Inputs:
    """Open what the settings name. Raises the one error that names what is missing, empty, mixed or too few."""
    source = settings.prompt_source
    prompts = None if source is None else load_prompts(source, settings.limit)
    reference = _reference(settings)
    if settings.generates:
        return Inputs(None, prompts, reference)
    items, notes = _with_prompts(_open(Path(settings.subject), settings, settings.limit), prompts)
    return Inputs(items, prompts, reference, notes)


def _open(folder: Path, settings: EvalSettings, limit: int | None = None) -> ItemSet:
    items = open_folder(folder)
    items = items if limit is None else items[:limit]
    if not settings.mixed_sizes:
        try:
            check_sizes(items)
        except ItemError as error:
            if "different sizes" not in str(error):
                raise
            raise ItemError(
                f"{error} Metrics of sets alone (fid, kid, ...) also take them with --mixed-sizes."
            ) from error
    return items


def _with_prompts(items: ItemSet, prompts: PromptSet | None) -> tuple[ItemSet, tuple[str, ...]]:
    """Each item with the prompt of its place."""
    if prompts is None:
        return items, ()
    extra = len(prompts) - len(items)
    note = f"{prompts.name} has {extra} more prompts than there are items: the first {len(items)} were taken in order"
    return items.with_prompts(prompts.texts), (note,) if extra > 0 else ()


def _reference(settings: EvalSettings) -> ItemSet | Statistics | None:
    text = settings.compares
    if text is None or text == PLAIN:
        return None
    path = Path(text)
    if path.is_file():
        return load(path)
    if not path.is_dir():
        raise ConfigError(
            f"there is no reference {text!r}: give a folder of images or videos, a statistics file, or `{PLAIN}` with "
            "a model and a plan"
        )
    return _open(path, settings)


def _kept(settings: EvalSettings) -> bool:
    return settings.stats is not None and settings.stats.exists()


def _is_caption(text: str) -> bool:
    try:
        Scene.parse(text)
    except ValueError:
        return False
    return True
