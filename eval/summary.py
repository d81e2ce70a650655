"""From stored features and per-item numbers to the results of an evaluation.

Everything is gathered in the order of the items, so the results do not depend on how, where or in how many runs the
stores were filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diffeff.errors import ConfigError
from diffeff.eval.append_log import digest
from diffeff.eval.entries import Entry
from diffeff.eval.measurement import numbers_of, own_key, store_of, text_key, text_store, versus_key
from diffeff.eval.metrics.alignment import clip_score, clip_temporal_consistency
from diffeff.eval.metrics.result import Result, bootstrap_mean
from diffeff.eval.metrics.table import Metric
from diffeff.eval.metrics.world import adherence_results
from diffeff.eval.probing import LATENTS, LPIPS, OWN, PIXELS, WORLD, Features, Task
from diffeff.eval.sets import gather, set_result
from diffeff.eval.statistics import Statistics

if TYPE_CHECKING:
    from diffeff.eval.store import WorkFolder

__all__ = ["Chosen", "Sides", "Summary", "results_of", "tasks_of"]

Values = Sequence[float | None]


@dataclass(frozen=True)
class Sides:
    """What is compared. `partners` are the reference items one by one beside the subject's, with their prompts;
    `reference` is the whole set that set metrics compare with, or its statistics."""

    subject: tuple[Entry, ...]
    partners: tuple[Entry, ...] | None = None
    reference: tuple[Entry, ...] | Statistics | None = None


@dataclass(frozen=True)
class Chosen:
    """A metric and the features that serve it, where it needs any."""

    metric: Metric
    features: Features | None = None

    @property
    def versus(self) -> str | None:
        """The name of its per-item numbers against a partner, if it is made of such."""
        name = self.metric.name
        if name in PIXELS or name in LATENTS:
            return name
        return f"{LPIPS}-{digest(self.features.facts)}" if name == LPIPS and self.features else None

    @property
    def own(self) -> str | None:
        """The name of its per-item numbers of an item alone, if it is made of such."""
        return WORLD if self.metric.kind == "world" else self.metric.name if self.metric.name in OWN else None


@dataclass(frozen=True)
class Summary:
    """The results, and the numbers of each item by metric, in the order of the items."""

    results: tuple[Result, ...]
    items: Mapping[str, Values]


def tasks_of(sides: Sides, chosen: Sequence[Chosen]) -> list[Task]:
    """What has to be known of every item for these metrics: the subject's, their partners' and the reference's."""
    sets = tuple(c.features for c in chosen if c.features and c.metric.kind == "set")
    beside = tuple(c.features for c in chosen if c.features and c.metric.kind in ("aligned", "single"))
    own = tuple(c.own for c in chosen if c.own)
    versus = tuple(c.versus for c in chosen if c.versus) if sides.partners else ()
    backbone = next((c.features.source for c in chosen if c.metric.name == LPIPS and c.features), None)
    reference = () if isinstance(sides.reference, Statistics) else sides.reference or ()
    in_set = {entry.sha256 for entry in reference}
    partners = sides.partners or ()
    tasks = [
        Task(entry, _once(sets + beside), own, partners[i] if partners else None, versus, backbone)
        for i, entry in enumerate(sides.subject)
    ]
    tasks += [Task(entry, _once((sets if entry.sha256 in in_set else ()) + beside), own) for entry in partners]
    return tasks + [Task(entry, _once(sets)) for entry in reference]


def _once(features: Sequence[Features]) -> tuple[Features, ...]:
    return tuple({(f.source, f.name): f for f in features}.values())


def results_of(sides: Sides, chosen: Sequence[Chosen], work: WorkFolder, seed: int = 0) -> Summary:
    """The results in the order of the metrics. Raises ConfigError where a metric cannot be computed from them."""
    maker = _Maker(sides, work, seed)
    results = [result for one in chosen for result in maker.make(one)]
    return Summary(tuple(results), maker.items)


class _Maker:
    """Makes the results of one evaluation and keeps the per-item numbers it meets."""

    def __init__(self, sides: Sides, work: WorkFolder, seed: int) -> None:
        self.sides, self.work, self.seed = sides, work, seed
        self.items: dict[str, Values] = {}

    def make(self, chosen: Chosen) -> list[Result]:
        if chosen.metric.kind == "set":
            return [self._set(chosen)]
        if chosen.metric.kind == "world":
            return self._world()
        if chosen.versus is not None:
            return [self._paired(chosen, chosen.versus)]
        values_of = _VALUES.get(chosen.metric.name, _own_values)
        return [self._single(chosen, values_of)]

    def _set(self, chosen: Chosen) -> Result:
        sides = self.sides
        if chosen.features is None or sides.reference is None:
            raise ConfigError(f"{chosen.metric.name} compares sets of features: give --reference and --features")
        sets = gather(chosen.features, sides.subject, sides.partners, sides.reference, self.work)
        return set_result(chosen.metric.name, sets, self.seed)

    def _paired(self, chosen: Chosen, name: str) -> Result:
        numbers = [numbers_of(name, self.work)[versus_key(task, name)] for task in self._pairs()]
        values: Values = [row["value"] for row in numbers]
        self.items[chosen.metric.name] = values
        facts = chosen.features.ability.facts if chosen.features else None
        result = chosen.metric.over_items(values, features=facts, seed=self.seed)
        worst = min if chosen.metric.better == "higher" else max
        place = worst(range(len(numbers)), key=lambda i: numbers[i]["value"])
        more: dict[str, Any] = {"worst_item": self.sides.subject[place].name}
        for part, pick in (("lowest_frame", min), ("highest_frame", max)):
            found = [row[part] for row in numbers if math.isfinite(row.get(part, math.nan))]
            more |= {part: pick(found)} if found else {}
        return replace(result, details={**result.details, **more})

    def _pairs(self) -> list[Task]:
        if self.sides.partners is None:
            raise ConfigError("metrics of pairs need a reference of the same names: give --reference")
        return [Task(a, partner=b) for a, b in zip(self.sides.subject, self.sides.partners, strict=True)]

    def _single(self, chosen: Chosen, values_of: _ValuesOf) -> Result:
        values = values_of(chosen, self.sides.subject, self.work)
        self.items[chosen.metric.name] = values
        facts = chosen.features.ability.facts if chosen.features else None
        result = chosen.metric.over_items(values, features=facts, seed=self.seed)
        if chosen.metric.kind == "aligned" and chosen.features:
            result = replace(result, details={**result.details, "text_is_compared_with": chosen.features.text_with})
        if self.sides.partners is None:
            return result
        beside = values_of(chosen, self.sides.partners, self.work)
        return replace(result, details={**result.details, **_beside(values, beside, self.seed)})

    def _world(self) -> list[Result]:
        mine = self._seen(self.sides.subject)
        self.items["adherence"] = [float(all(record.values())) for record in mine]
        results = adherence_results(mine)
        if self.sides.partners is None:
            return results
        beside = {r.details["attribute"]: r for r in adherence_results(self._seen(self.sides.partners))}
        return [
            replace(r, details={**r.details, "reference": _proportion(beside[r.details["attribute"]])}) for r in results
        ]

    def _seen(self, entries: Sequence[Entry]) -> list[dict[str, bool]]:
        store = numbers_of(WORLD, self.work)
        return [{name: right > 0 for name, right in store[own_key(entry, WORLD)].items()} for entry in entries]


_ValuesOf = Callable[[Chosen, Sequence[Entry], "WorkFolder"], Values]


def _own_values(chosen: Chosen, entries: Sequence[Entry], work: WorkFolder) -> Values:
    store, name = numbers_of(chosen.metric.name, work), chosen.metric.name
    values = [store[own_key(entry, name)]["value"] for entry in entries]
    return [None if math.isnan(value) else value for value in values]


def _scores(chosen: Chosen, entries: Sequence[Entry], work: WorkFolder) -> Values:
    """CLIP score of each item: the mean over its rows, one a frame or one for the whole clip."""
    features = _needed(chosen)
    pictures, words, scale = store_of(features, work), text_store(features, work), features.ability.text_scale or 1.0
    return [
        float(clip_score(pictures.get(e.sha256)[None], words.get(text_key(e.prompt or "")), scale)[0]) for e in entries
    ]


def _consistency(chosen: Chosen, entries: Sequence[Entry], work: WorkFolder) -> Values:
    store = store_of(_needed(chosen), work)
    return [clip_temporal_consistency(store.get(entry.sha256)) for entry in entries]


def _needed(chosen: Chosen) -> Features:
    if chosen.features is None:
        raise ConfigError(f"{chosen.metric.name} needs features: give --features")
    return chosen.features


_VALUES: Mapping[str, _ValuesOf] = {"clip": _scores, "clip_consistency": _consistency}


def _beside(values: Values, reference: Values, seed: int) -> dict[str, Any]:
    """The same number of the reference, and the mean difference of the pairs with its interval."""
    pairs = [(a, b) for a, b in zip(values, reference, strict=True) if a is not None and b is not None]
    if not pairs:
        return {}
    theirs = np.array([b for _, b in pairs])
    differences = np.array([a - b for a, b in pairs])
    found: dict[str, Any] = {"reference": {"value": float(theirs.mean()), "n": len(pairs)}}
    if len(pairs) > 1:
        interval = bootstrap_mean(differences, seed=seed)
        found["difference"] = {"value": float(differences.mean()), "low": interval.low, "high": interval.high}
    return found


def _proportion(result: Result) -> dict[str, Any]:
    interval = result.interval
    ends = None if interval is None else [interval.low, interval.high]
    return {"value": result.value, "n": result.n, "right": result.details["right"], "interval95": ends}
