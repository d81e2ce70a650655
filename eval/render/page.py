"""The HTML pages of `diffeff bench` and `diffeff eval`: one file each, nothing loaded, made from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

from diffeff.errors import ConfigError
from diffeff.eval.render.bench_sections import arm_table, clips, headline, identified, settings
from diffeff.eval.render.document import Column, anchor, document, said, section, sortable
from diffeff.eval.render.evaluation_page import evaluation_page
from diffeff.eval.render.markup import Markup, element, joined
from diffeff.eval.render.records import Cell, Row, cells, latest, models, of
from diffeff.eval.render.scatter import scatter
from diffeff.eval.render.tables import DASH, matrix_grid, matrix_notes, percent, status_word

__all__ = ["bench_page", "evaluation_page"]


def bench_page(rows: Sequence[Row]) -> str:
    """A page of the newest run of every model in `rows`, and of the matrix and scaling rows among them.

    Raises ConfigError when there is nothing to show.
    """
    parts: dict[str, Markup] = {}
    for model in models(of(rows, "bench")):
        parts |= _model(model, cells(latest(rows, model)))
    if scaling := of(rows, "scaling"):
        parts["Scaling"] = section("Scaling", _scaling(scaling))
    if matrix := of(rows, "matrix"):
        parts["Methods and families"] = section("Methods and families", _matrix(matrix))
    if not parts:
        raise ConfigError("nothing to show: no rows of `diffeff bench` are given. Measure first.")
    title = ", ".join(models(of(rows, "bench"))) or ", ".join(dict.fromkeys(str(r["benchmark"]) for r in rows))
    return document(f"{title}: what acceleration buys and costs", "diffeff bench", _meta(rows), parts, _FOOTER)


_FOOTER = (
    "Speed-ups are ratios to plain of the same prompt, arms taking turns. PSNR is against plain at the same seed and "
    "all its steps: how close a clip is to plain's, not how good it is. Made from the recorded rows; nothing is loaded."
)


def _meta(rows: Sequence[Row]) -> list[str]:
    """Who measured what, in one line per model."""
    return [_line(cells(latest(rows, model))) for model in models(of(rows, "bench"))]


def _line(found: Sequence[Cell]) -> str:
    plain, row = found[0], found[0].row
    took = f"{plain.seconds.value:.2g} s a clip" if plain.seconds else ""
    parts = [
        str(row["model"]),
        f"{row.get('prompts')} prompts of {row.get('prompt_set')}",
        f"plain: {row.get('steps')} steps" + (f", {took}" if took else ""),
        f"{row.get('device')} {row.get('dtype')}, {row.get('threads')} threads".replace(" 1 threads", " 1 thread"),
        str(row.get("when") or "")[:10],
        f"commit {row['commit']}" if row.get("commit") else "",
    ]
    return " · ".join(part for part in parts if part)


def _model(model: str, found: Sequence[Cell]) -> dict[str, Markup]:
    ident = identified(found, model)
    shown = [cell for cell in found if cell.rated]
    plot = [element("h3", "Speed against closeness to plain"), scatter(found, ident)] if shown else []
    moving = clips(found, ident, f"{anchor(model)}-clips")
    caption = "The first prompt of the set at the first seed, every arm in step."
    return {
        model: section(
            model,
            headline(found),
            *plot,
            element("h3", "Every arm"),
            arm_table(found, ident),
            *([element("h3", "Side by side"), element("p", caption, class_="meta"), moving] if moving else []),
            element("h3", "How it was measured"),
            settings(found),
        )
    }


def _scaling(rows: Sequence[Row]) -> Markup:
    columns = [Column("model", words=True), Column("axis", words=True), Column("time grows as x to the")]
    columns += [Column("memory above load grows as x to the"), Column("x: seconds, MiB above load", words=True)]
    body = [
        element(
            "tr",
            element("th", str(row["model"]) + (" with plan" if row.get("plan") else ""), scope="row"),
            element(
                "td", str(row["axis"]), element("small", row.get("unit")), class_="words", data_value=str(row["axis"])
            ),
            _slope(row, "slope_time"),
            _slope(row, "slope_memory"),
            element("td", _points(row), class_="words"),
        )
        for row in rows
    ]
    return sortable("Exponents of log-log fits with 95 % intervals.", columns, body)


def _slope(row: Row, field: str) -> Markup:
    slope = row.get(field) or {}
    if slope.get("value") is None:
        return element("td", DASH)
    interval = None if slope.get("low") is None else element("small", f"[{slope['low']:.2f}, {slope['high']:.2f}]")
    return element("td", f"{slope['value']:.2f}", interval, data_value=repr(slope["value"]))


def _points(row: Row) -> Markup:
    """Each point on one line, and what failed."""
    texts = []
    for point in row["points"]:
        added = point.get("above_load_bytes")
        memory = "" if added is None else f", {added / 2**20:.3g}"
        texts.append(f"{point['x']:g}: {point['seconds']:.3g} s{memory}")
    texts += [f"{failed['value']} failed: {failed['error']}" for failed in row.get("failed") or ()]
    whole = [element("span", text, class_="one") for text in texts]
    return joined([part for text in whole for part in ("; ", text)][1:])


def _matrix(rows: Sequence[Row]) -> Markup:
    methods, families, pairs = matrix_grid(rows)
    body = [
        element(
            "tr",
            element("th", family, scope="row", data_value=family),
            *(_tile(pairs.get((method, family))) for method in methods),
        )
        for family in families
    ]
    columns = [Column("family", words=True), *(Column(method, words=True) for method in methods)]
    caption = "Tiny random models: the share of the work left, or that it does not work and why, below."
    notes = (f"{method}, {what}. {reason}" for method, what, reason in matrix_notes(rows))
    return joined([sortable(caption, columns, body), said(notes)])


def _tile(row: Row | None) -> Markup:
    if row is None:
        return element("td", DASH, class_="words")
    status = str(row["status"])
    left = row.get("compute_left")
    word = percent(left) if status == "works" and left is not None else status_word(status)
    return element("td", word, class_=f"words {status}", data_value=f"{status} {left or 0:.4f}")
