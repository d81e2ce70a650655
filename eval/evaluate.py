"""One evaluation from its settings to its report: list, choose, generate, measure, summarise, judge, write.

Cheap checks come first: names, places, files, sizes, feature sources. Then come the hours. Everything computed is kept
in the work folder at once, so a run that is stopped, or fails at an item, continues where it was and ends with the
same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffeff.errors import ConfigError
from diffeff.eval.append_log import digest
from diffeff.eval.choosing import choose, metrics_for
from diffeff.eval.description import of_model, samples_of, versions
from diffeff.eval.engine import Engine, open_engine
from diffeff.eval.entries import Entry, content, from_folder, from_made, paired, same_names
from diffeff.eval.gates import Gate, Verdict, judge, parse_gates
from diffeff.eval.generation import Recipe, Shot, arm_of, describe, make
from diffeff.eval.inputs import Inputs, list_inputs
from diffeff.eval.items import ItemSet
from diffeff.eval.measurement import abilities, measure, store_of, texts
from diffeff.eval.metrics.result import Result
from diffeff.eval.metrics.table import resolve
from diffeff.eval.probing import Ability, Sources
from diffeff.eval.render.evaluation import write_report
from diffeff.eval.sets import counts_of
from diffeff.eval.settings import PLAIN, EvalSettings
from diffeff.eval.statistics import Statistics, load, save
from diffeff.eval.store import WorkFolder
from diffeff.eval.summary import Chosen, Sides, Summary, results_of, tasks_of
from diffeff.plan import Plan
from diffeff.report import environment

__all__ = ["EvalSettings", "Evaluation", "Observe", "evaluate"]

VERSION = 1
_STORED = "generated pixels are stored, and compared, as 8-bit"

Observe = Callable[[str, int, int | None], None]
"""Told what is done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Evaluation:
    """What came out. `report` is the JSON that was written, `files` where everything is."""

    report: Mapping[str, Any]
    results: tuple[Result, ...]
    verdicts: tuple[Verdict, ...]
    files: Mapping[str, Path]

    @property
    def failed(self) -> bool:
        """Whether a gate failed."""
        return any(verdict.failed for verdict in self.verdicts)


def evaluate(settings: EvalSettings, observe: Observe = lambda what, done, total: None) -> Evaluation:
    """Run an evaluation and write its report beside `settings.out`: .json, .md, .csv and .items.csv, and HTML if asked.

    Raises a DiffEffError for whatever is wrong with the settings, a file or a source. What was computed by then is
    kept, and used by the next run.
    """
    settings.check()
    if settings.metrics is not None:
        parse_gates(settings.fail_if, [metric.name for metric in resolve(settings.metrics)])
    with (
        WorkFolder(settings.folder) as work,
        open_engine(
            settings.engine, workers=settings.workers, threads=settings.threads, gpus=_gpus(settings)
        ) as engine,
    ):
        return _Run(settings, work, engine, observe).finish()


def _gpus(settings: EvalSettings) -> float:
    return settings.gpus if settings.engine == "ray" and settings.device.startswith("cuda") else 0.0


class _Run:
    """One evaluation under way."""

    def __init__(self, settings: EvalSettings, work: WorkFolder, engine: Engine, observe: Observe) -> None:
        self.settings, self.work, self.engine, self.observe = settings, work, engine, observe
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.started = time.perf_counter()

    def finish(self) -> Evaluation:
        """Every step in order."""
        settings = self.settings
        inputs = list_inputs(settings)
        self.notes += inputs.notes
        sources = Sources(self._specs(inputs), settings.device)
        chosen = self._choose(inputs, sources)
        gates = parse_gates(settings.fail_if, [c.metric.name for c in chosen])
        kept = self._statistics(chosen, inputs)
        sides, facts = self._sides(inputs, chosen)
        sides = self._with_statistics(sides, kept)
        with self._timed("measure"):
            self._measure(sides, chosen, sources)
        if settings.stats is not None and kept is None:
            self._save_statistics(settings.stats, sides, chosen, facts)
        with self._timed("summarise"):
            self.observe("compute the metrics", 0, None)
            summary = results_of(sides, chosen, self.work, settings.seed)
        return self._write(sides, inputs, facts, summary, gates)

    # --- choose -------------------------------------------------------------------------------------------------
    def _specs(self, inputs: Inputs) -> tuple[str, ...]:
        """The sources to load: none when no metric that is asked for needs any."""
        asked = self.settings.metrics
        if asked is not None and not any("features" in metric.needs for metric in resolve(asked)):
            return ()
        return self.settings.features or (("sprites",) if inputs.scenes else ())

    def _choose(self, inputs: Inputs, sources: Sources) -> list[Chosen]:
        settings = self.settings
        found: tuple[Ability, ...] = ()
        if sources.specs:
            self.observe("load the feature sources", 0, None)
            found = abilities(self.engine, sources)
        metrics = metrics_for(settings.metrics, inputs.given(settings, found))
        return choose(metrics, found, settings.frames_per_clip, settings.device)

    def _statistics(self, chosen: Sequence[Chosen], inputs: Inputs) -> Statistics | None:
        """Statistics to compare with, if there are any, made by the same sources."""
        found = inputs.reference if isinstance(inputs.reference, Statistics) else None
        if self.settings.stats is not None and self.settings.stats.exists():
            found = load(self.settings.stats)
        for one in chosen:
            if found is not None and one.metric.kind == "set" and one.features is not None:
                found.of(one.features.name, one.features.facts)
        return found

    def _with_statistics(self, sides: Sides, kept: Statistics | None) -> Sides:
        if kept is None:
            return sides
        if sides.reference and not isinstance(sides.reference, Statistics):
            here = content(sides.reference)
            if here["sha256"] != kept.content:
                raise ConfigError(
                    f"{kept.path} was made from other items ({kept.items} of {kept.origin}) than the reference has now "
                    f"({here['items']}). Delete it to make it anew, or name another file."
                )
        return replace(sides, reference=kept)

    def _save_statistics(self, path: Path, sides: Sides, chosen: Sequence[Chosen], facts: Mapping[str, Any]) -> None:
        wanted = {c.features.name: c.features for c in chosen if c.features and c.metric.kind == "set"}
        if not wanted or not sides.reference or isinstance(sides.reference, Statistics):
            raise ConfigError(
                "--stats keeps features of a reference set: ask for a set metric such as fid, and give one"
            )
        keys = [entry.sha256 for entry in sides.reference]
        rows = {name: store_of(features, self.work).gather(keys) for name, features in wanted.items()}
        made_by = {name: features.facts for name, features in wanted.items()}
        counts = {name: counts_of(features, sides.reference, self.work) for name, features in wanted.items()}
        save(path, rows, made_by, counts, content(sides.reference), str(facts["reference"].get("path", PLAIN)))

    # --- sides --------------------------------------------------------------------------------------------------
    def _sides(self, inputs: Inputs, chosen: Sequence[Chosen]) -> tuple[Sides, dict[str, Any]]:
        """What is compared, and what the report says about each side."""
        if inputs.items is not None:
            return self._found(inputs.items, inputs)
        with self._timed("generate"):
            sides, facts = self._generated(inputs, any(c.metric.kind == "paired" for c in chosen))
        if any("latents" in c.metric.needs for c in chosen) and sides.subject[0].latents is None:
            raise ConfigError(
                f"{facts['subject']['pipeline']} does not hand out its latents: leave out latent_cosine and latent_l2"
            )
        return sides, facts

    def _found(self, items: ItemSet, inputs: Inputs) -> tuple[Sides, dict[str, Any]]:
        self.observe("read the items", 0, None)
        subject = from_folder(items)
        facts: dict[str, Any] = {"subject": {"kind": "folder", "path": str(items.folder), **content(subject)}}
        reference, facts["reference"] = self._reference(inputs)
        partners = None
        if isinstance(reference, tuple) and same_names(subject, reference):
            partners = _beside(subject, reference)
        return Sides(subject, partners, reference), facts

    def _reference(self, inputs: Inputs) -> tuple[tuple[Entry, ...] | Statistics | None, dict[str, Any] | None]:
        if isinstance(inputs.reference, ItemSet):
            entries = from_folder(inputs.reference)
            return entries, {"kind": "folder", "path": str(inputs.reference.folder), **content(entries)}
        if inputs.reference is not None:
            return inputs.reference, inputs.reference.describe()
        return None, None

    def _generated(self, inputs: Inputs, pairs: bool) -> tuple[Sides, dict[str, Any]]:
        settings = self.settings
        self.observe(f"load {settings.subject}", 0, None)
        recipe = Recipe(settings.subject, settings.call, settings.device, settings.dtype)
        plans = {"plan": settings.plan} if settings.plan is not None else {"plain": Plan()}
        if settings.plan is not None and (pairs or settings.compares == PLAIN):
            plans = {"plain": Plan(), **plans}
        known = describe(self.engine, recipe, tuple(plans.values()))
        shots = inputs.shots(settings.seed)
        sides = {name: self._arm(name, plan, recipe, known, shots) for name, plan in plans.items()}
        subject = sides["plan" if settings.plan is not None else "plain"]
        partners = _beside(subject, sides["plain"]) if len(sides) == 2 else None
        reference, about = self._reference(inputs)
        facts: dict[str, Any] = {"subject": of_model(settings, known, settings.plan, subject), "reference": about}
        if partners is not None:
            facts["pairs"] = of_model(settings, known, None, partners)
            if settings.compares == PLAIN:
                reference, facts["reference"] = partners, facts.pop("pairs")
        self.notes.append(_STORED)
        return Sides(subject, partners, reference), facts

    def _arm(
        self, name: str, plan: Plan, recipe: Recipe, known: Mapping[str, Any], shots: Sequence[Shot]
    ) -> tuple[Entry, ...]:
        batch = self.settings.batch
        decides = {**known, "batch": batch} | ({"shots": digest([s.name for s in shots])} if batch > 1 else {})
        arm = arm_of(name, plan, decides, self.work.path)
        what = f"generate {name}"
        made = make(self.engine, recipe, arm, shots, batch, lambda done, total: self.observe(what, done, total))
        broken = sum(one.broken for one in made)
        if broken:
            self.notes.append(f"{name}: {broken} of {len(made)} clips have pixels that are not numbers, stored black")
        return from_made(made)

    # --- measure ------------------------------------------------------------------------------------------------
    def _measure(self, sides: Sides, chosen: Sequence[Chosen], sources: Sources) -> None:
        tasks = tasks_of(sides, chosen)
        measure(self.engine, sources, tasks, self.work, lambda done, total: self.observe("measure", done, total))
        aligned = next((c.features for c in chosen if c.features and c.metric.kind == "aligned"), None)
        if aligned is not None:
            prompts = [entry.prompt or "" for entry in sides.subject]
            self.notes += texts(self.engine, sources, aligned, prompts, self.work)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    # --- write --------------------------------------------------------------------------------------------------
    def _write(
        self, sides: Sides, inputs: Inputs, facts: Mapping[str, Any], summary: Summary, gates: Sequence[Gate]
    ) -> Evaluation:
        verdicts = judge(gates, summary.results)
        device = {"device": self.settings.device, "dtype": self.settings.dtype, **self.engine.describe()}
        self.seconds["total"] = round(time.perf_counter() - self.started, 3)
        report = {
            "diffeff_eval": VERSION,
            **facts,
            "prompts": inputs.about_prompts,
            "results": [result.to_dict() for result in summary.results],
            "gates": [verdict.to_dict() for verdict in verdicts],
            "notes": [*self.notes, *self.engine.events],
            "settings": self.settings.to_dict(),
            "environment": {**environment(), **versions(), **device},
            "samples": samples_of(sides),
            "seconds": self.seconds,
        }
        names = [entry.name for entry in sides.subject]
        files = write_report(self.settings.out, self.settings.html, report, names, summary.items)
        return Evaluation(report, summary.results, verdicts, files)


def _beside(subject: Sequence[Entry], reference: Sequence[Entry]) -> tuple[Entry, ...]:
    """The partner of each subject item, with the prompt of that item: both are judged by the same words."""
    return tuple(replace(partner, prompt=entry.prompt) for entry, partner in paired(subject, reference))
