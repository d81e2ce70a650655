"""Measuring many items, resumable: what the stores lack is computed by the workers of an engine and kept at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diffeff.eval.append_log import code_digest
from diffeff.eval.entries import Entry
from diffeff.eval.items import item_sha
from diffeff.eval.probing import (
    LATENTS,
    WORLD,
    Ability,
    Features,
    Outcome,
    Sources,
    Task,
    abilities_of,
    embed_text,
    notes_on_texts,
    probe,
)

if TYPE_CHECKING:
    from diffeff.eval.engine import Engine
    from diffeff.eval.store import FeatureStore, ScalarStore, WorkFolder

__all__ = ["abilities", "measure", "numbers_of", "own_key", "store_of", "text_key", "text_store", "texts", "versus_key"]


_CODE = tuple(f"diffeff.eval.metrics.{name}" for name in ("fidelity", "temporal", "perceptual", "world"))
_CODE += ("diffeff.zoo.measure",)


def abilities(engine: Engine, sources: Sources) -> tuple[Ability, ...]:
    """What the sources can do, as a worker that has loaded them says it. Raises what is wrong with them."""
    return next(found for _, found in engine.map(abilities_of, [sources.specs], setup=sources))


def texts(
    engine: Engine, sources: Sources, wanted: Features, prompts: Sequence[str], work: WorkFolder
) -> tuple[str, ...]:
    """Embed the prompts that are not in the store yet, one at a time. Returns what the source says about them."""
    store = text_store(wanted, work)
    missing = [text for text in dict.fromkeys(prompts) if text_key(text) not in store]
    for index, rows in engine.map(embed_text, [(wanted.source, text) for text in missing], setup=sources):
        store.add(text_key(missing[index]), rows)
    return next(n for _, n in engine.map(notes_on_texts, [(wanted.source, tuple(prompts))], setup=sources))


def numbers_of(name: str, work: WorkFolder) -> ScalarStore:
    """Where the numbers of items of one name are kept: apart for each version of the code that computes them."""
    return work.scalars(f"{name}-{code_digest(*_CODE)}")


def text_store(wanted: Features, work: WorkFolder) -> FeatureStore:
    """Where the embeddings of texts are kept."""
    return work.features(wanted.facts, "texts", wanted.dim)


def text_key(text: str) -> str:
    """What a text is kept under."""
    return hashlib.sha256(text.encode()).hexdigest()


def store_of(wanted: Features, work: WorkFolder) -> FeatureStore:
    """Where these vectors are kept."""
    return work.features(wanted.facts, wanted.name, wanted.dim)


def measure(
    engine: Engine,
    sources: Sources,
    tasks: Iterable[Task],
    work: WorkFolder,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compute what is missing and keep it, item after item. What is there when an item fails stays there.

    Files of one content are computed once. `observe(done, total)` follows.
    """
    left, total = _missing(tasks, work)
    done = total - len(left)
    observe(done, total)
    for index, outcome in engine.map(probe, left, setup=sources):
        _store(left[index], outcome, work)
        done += 1
        observe(done, total)


def _missing(tasks: Iterable[Task], work: WorkFolder) -> tuple[list[Task], int]:
    """The tasks without what the stores have and without what an earlier one of them brings, and how many came."""
    left: list[Task] = []
    total = 0
    claimed: set[tuple[str, str]] = set()

    def fresh(store: Container[object], name: str, key: str) -> bool:
        known = key in store or (name, key) in claimed
        claimed.add((name, key))
        return not known

    for task in tasks:
        total += 1
        entry, features = task.entry, task.features
        rest = replace(
            task,
            features=tuple(f for f in features if fresh(store_of(f, work), f"{f.source}-{f.name}", entry.sha256)),
            own=tuple(name for name in task.own if fresh(numbers_of(name, work), name, own_key(entry, name))),
            versus=tuple(name for name in task.versus if fresh(numbers_of(name, work), name, versus_key(task, name))),
        )
        if rest.wants:
            left.append(rest)
    return left, total


def own_key(entry: Entry, name: str) -> str:
    """What a number of an item alone is kept under."""
    return entry.sha256 if name != WORLD else f"{entry.sha256}-{text_key(entry.prompt or '')}"


def versus_key(task: Task, name: str) -> str:
    """What a number of an item against its partner is kept under: the contents of both."""
    if task.partner is None:
        raise ValueError("a task without a partner has no numbers against one")
    pair = (task.entry, task.partner)
    if name in LATENTS:
        return "-".join(item_sha(entry.latents) for entry in pair if entry.latents is not None)
    return "-".join(entry.sha256 for entry in pair)


def _store(task: Task, outcome: Outcome, work: WorkFolder) -> None:
    for wanted, rows in zip(task.features, outcome.rows, strict=True):
        store_of(wanted, work).add(task.entry.sha256, rows)
    for name, values in outcome.own.items():
        numbers_of(name, work).add(own_key(task.entry, name), values)
    for name, values in outcome.versus.items():
        numbers_of(name, work).add(versus_key(task, name), values)
