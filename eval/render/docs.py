"""Keeps README.md and docs/benchmarks.md true: `python -m diffeff.eval.render.docs` makes their numbers and plots anew,
and docs/methods.md whole.

Each generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`: families and methods from the code, presets
from the presets, models from the bundled cards, everything measured from the JSON lines under `eval/results/`. A test
compares the texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffeff.anatomy.table import families
from diffeff.errors import UnknownName, nearest
from diffeff.eval.render import methods, plots
from diffeff.eval.render.advice import curves, sentences
from diffeff.eval.render.document import anchor
from diffeff.eval.render.equal_quality import equal_quality_table, is_tuned
from diffeff.eval.render.layout import groups_of
from diffeff.eval.render.markup import Markup
from diffeff.eval.render.records import Cell, Row, cells, latest, newest, of, read_rows
from diffeff.eval.render.speed_plot import speed_psnr
from diffeff.eval.render.studies import STUDIES
from diffeff.eval.render.tables import (
    bench_table,
    failures_table,
    features_tables,
    markdown,
    matrix_notes,
    matrix_table,
    overhead_table,
    scaling_table,
)
from diffeff.files import write_text
from diffeff.methods.table import config_classes
from diffeff.plan import Plan
from diffeff.presets import PRESETS
from diffeff.zoo import bundled

__all__ = ["PAGES", "ROOT", "draw", "headline", "records", "update"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"
IMAGES = ROOT / "docs" / "images"
PAGES = ("README.md", "docs/benchmarks.md")
MODELS = ("sprites-wan", "sprites-motion", "sprites-sd")
BENCHMARKS = "docs/benchmarks.md"


def update(text: str, results: Path = RESULTS) -> str:
    """`text` with every generated part made anew from the files in `results`.

    Raises UnknownName for a marker nobody fills.
    """
    parts = _parts(results)
    for name in re.findall(r"<!-- (\w[\w-]*) -->", text):
        if name not in parts:
            raise UnknownName(f"nothing fills the part {name!r}. {nearest(name, parts)}")
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, _fill(parts[name]()), text, flags=re.DOTALL)
    return text


def _fill(part: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{part}\n{found[2]}"


def _parts(results: Path) -> dict[str, Callable[[], str]]:
    parts: dict[str, Callable[[], str]] = {
        "families": _families,
        "methods": _methods,
        "presets": _presets,
        "models": _models,
        "features": partial(_features, results),
        "matrix": partial(_matrix, results),
        "overhead": partial(_overhead, results),
        "scaling": partial(_scaling, results),
    }
    parts |= {f"study-{name.replace(' ', '-')}": partial(_study, results, name) for name in STUDIES}
    for model in MODELS:
        parts |= {f"trade-{model}": partial(_short, results, model), f"bench-{model}": partial(_whole, results, model)}
    return parts


def records(benchmark: str, results: Path = RESULTS) -> list[Row]:
    """The rows of one benchmark in all files of the folder; none when it was never measured."""
    return [row for path in sorted(results.glob("*.jsonl")) for row in of(read_rows(path), benchmark)]


# --- what a bench measured ------------------------------------------------------------------------------------------
def _run(results: Path, model: str) -> list[Cell]:
    """The arms of the newest run of one model."""
    return cells(latest(records("bench", results), model))


def _short(results: Path, model: str) -> str:
    """A model's headline arms, each linked to its line of docs/benchmarks.md."""
    found = _run(results, model)
    if not found:
        return _unmeasured(model)

    def linked(cell: Cell) -> str:
        return Markup(f"[{cell.label}]({BENCHMARKS}#{_line(model, cell)})")

    return bench_table(headline(found), found, short=True, named=linked)


def headline(found: Sequence[Cell]) -> list[Cell]:
    """Plain, the presets and tuned plans as they are, and what is nearest to the presets in speed: the own solver with
    fewer steps for each, the other solvers and the best sweep of each package for the middle one."""
    presets = [cell for cell in found if cell.kind == "plan" and cell.label in PRESETS and cell.rated]
    tuned = [cell for cell in found if is_tuned(cell) and cell.rated]
    marks = sorted(cell.speed.value for cell in presets if cell.speed) or [2.0]
    middle = marks[len(marks) // 2]
    own, *others = [*curves(found).values()] or [[]]
    near = [min(own, key=partial(_away, mark)) for mark in marks if own]
    near += [min(curve, key=partial(_away, middle)) for curve in others]
    packages: dict[str, Cell] = {}
    for group in groups_of(found).values():
        if group[0].kind == "peer":
            cell = min(group, key=partial(_away, middle))
            packages[cell.package] = max(packages.get(cell.package, cell), cell, key=_closeness)
    kept = {id(cell) for cell in (*presets, *tuned, *near, *packages.values())}
    return [cell for cell in found if cell.is_plain or id(cell) in kept]


def _away(mark: float, cell: Cell) -> float:
    return abs(cell.speed.value - mark) if cell.speed else float("inf")


def _closeness(cell: Cell) -> float:
    return cell.psnr.value if cell.psnr else 0.0


def _whole(results: Path, model: str) -> str:
    """Every arm of a model's newest run, what they say, what did not work, and the plots."""
    found = _run(results, model)
    if not found:
        return _unmeasured(model)

    def named(cell: Cell) -> str:
        return Markup(f'<a id="{_line(model, cell)}"></a>{cell.label}')

    said = "\n".join(f"- {line}" for line in sentences(found))
    shown = [_image(f"bench-{model}", f"{model}: speed-up against PSNR")] if any(c.rated for c in found) else []
    shown += [_image(f"bench-{model}-memory", "peak memory")] if any(c.peak_bytes for c in found) else []
    shown += [_image(f"bench-{model}-adherence", "adherence by attribute")] if any(c.adherence for c in found) else []
    parts = [_conditions(found), shown[0] if shown else "", said, bench_table(found, named=named)]
    if table := equal_quality_table(found):
        parts.insert(2, f"At the same PSNR to plain, between the points of each contender's own sweep:\n\n{table}")
    return "\n\n".join(part for part in [*parts, failures_table(found, named), *shown[1:]] if part)


def _line(model: str, cell: Cell) -> str:
    return anchor(f"{model} {cell.label}")


def _conditions(found: Sequence[Cell]) -> str:
    """Under which conditions, and the command that makes the rows again."""
    row = found[0].row
    versions = {key: value for cell in found for key, value in (cell.row.get("environment") or {}).items()}
    listed = ", ".join(f"{name} {value}" for name, value in versions.items() if isinstance(value, str))
    threads = f"{row['threads']} thread" + ("" if row["threads"] == 1 else "s")
    example = next((cell for cell in found if cell.kind == "plan" and not cell.hopeless), found[0])
    return (
        f"{row['prompts']} prompts of `{row['prompt_set']}`, seed {row['seed']} and on, {row['steps']} steps, "
        f"{row['device']} {row['dtype']}, {threads}; run {row['run']}, {listed}. Every row holds "
        f"the command that makes it again; the one of {example.label}:\n\n```\n{example.row['command']}\n```"
    )


def _unmeasured(model: str) -> str:
    return f"Not measured yet: `diffeff bench {model} --against all --sweep --out eval/results/bench.jsonl` does."


def _image(name: str, words: str) -> str:
    return f"![{words}](images/{name}.png)"


# --- the other measurements -----------------------------------------------------------------------------------------
def _scaling(results: Path) -> str:
    rows = newest(records("scaling", results), "model", "axis", "plan")
    if not rows:
        return "Not measured yet: `diffeff bench scaling` does."
    return (
        f"{_image('bench-scaling', 'time and memory against tokens, frames, steps and batch')}\n\n{scaling_table(rows)}"
    )


def _matrix(results: Path) -> str:
    rows = newest(records("matrix", results), "method", "family")
    if not rows:
        return "Not measured yet: `diffeff bench matrix` does."
    notes = [[f"`{method}`", what, reason] for method, what, reason in matrix_notes(rows)]
    reasons = markdown(["method", "where", "reason"], notes) if notes else ""
    picture = _image("bench-matrix", "every method on every family")
    return "\n\n".join(part for part in (picture, matrix_table(rows), reasons) if part)


def _overhead(results: Path) -> str:
    rows = newest(records("overhead", results), "model")
    return overhead_table(rows) if rows else "Not measured yet: `python -m diffeff.eval.overhead` does."


def _study(results: Path, name: str) -> str:
    return STUDIES[name].table(records(name, results))


def _features(results: Path) -> str:
    rows = newest(records("features", results), "check", "kind", "attribute", "model")
    if not rows:
        return "Not measured yet: `python -m diffeff.eval.features_check` does."
    return "\n\n".join([_image("features-check", "distances of spoilt clips"), *features_tables(rows)])


def draw(images: Path = IMAGES, results: Path = RESULTS) -> Iterator[Path]:
    """Write every plot that docs/benchmarks.md shows and whose rows exist; yields their paths."""
    for model in MODELS:
        if found := _run(results, model):
            yield from _draw_run(images, model, found)
    if rows := newest(records("scaling", results), "model", "axis", "plan"):
        yield plots.save(plots.scaling(rows, "How time and memory grow"), images / "bench-scaling.png")
    if rows := newest(records("matrix", results), "method", "family"):
        title = "Every method on every family, tiny: share of the work left"
        yield plots.save(plots.matrix_map(rows, title), images / "bench-matrix.png")


def _draw_run(images: Path, model: str, found: Sequence[Cell]) -> Iterator[Path]:
    drawings: Sequence[tuple[str, bool, Callable[[], Any]]] = (
        ("", any(c.rated for c in found), lambda: speed_psnr(found, f"{model}: speed against closeness to plain")),
        ("-memory", any(c.peak_bytes for c in found), lambda: plots.memory_bars(found, f"{model}: peak memory")),
        (
            "-adherence",
            any(c.adherence for c in found),
            lambda: plots.adherence_bars(headline(found), f"{model}: results that show their caption"),
        ),
    )
    for suffix, possible, drawing in drawings:
        if possible:
            yield plots.save(drawing(), images / f"bench-{model}{suffix}.png")


# --- what the code and the cards say --------------------------------------------------------------------------------
def _families() -> str:
    return markdown(["family", "denoiser classes", "guidance"], [[r.title, r.classes, r.guidance] for r in families()])


def _methods() -> str:
    rows = [[f"`{name}`", config.summary] for name, config in config_classes().items()]
    return markdown(["method", "what it buys"], rows)


def _presets() -> str:
    rows = [[f"`{name}`", preset.summary, _one_line(Plan.preset(name))] for name, preset in PRESETS.items()]
    return markdown(["preset", "for", "holds"], rows)


def _one_line(plan: Plan) -> str:
    entries = []
    for config in plan.methods:
        defaults = type(config)().to_dict()
        changed = {k: v for k, v in config.to_dict().items() if k == "use" or v != defaults[k]}
        options = ", ".join(f"{k}={v}" for k, v in changed.items() if k != "use")
        entries.append(f"`{config.name}`({options})")
    return ", ".join(entries) or "nothing: plain diffusers, measured"


def _models() -> str:
    rows = []
    for name in bundled.NAMES:
        card = bundled.card(name)
        rows.append([f"[`{name}`](diffeff/zoo/models/{name}/README.md)", card["pipeline"], _scores(card)])
    return markdown(["model", "pipeline", "scores on held-out captions or classes"], rows)


def _scores(card: dict[str, Any]) -> str:
    return ", ".join(_proportion(name, entry) for name, entry in bundled.proportions(card))


def _proportion(name: str, entry: Mapping[str, Any]) -> str:
    low, high = entry["interval95"]
    label = "" if name == "scores" else f"{name} "
    return f"{label}{entry['right']} of {entry['trials']} [{100 * low:.0f} to {100 * high:.0f} %]"


def main() -> None:
    """Rewrite the generated parts of all pages and draw all plots."""
    for name in PAGES:
        page = ROOT / name
        write_text(page, update(page.read_text("utf-8")))
        sys.stderr.write(f"updated {name}\n")
    methods.main()
    for path in draw():
        sys.stderr.write(f"drew {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
