"""The HTML page of `diffeff eval`: verdicts first, then every number with its interval, samples, settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffeff.eval.metrics.table import METRICS
from diffeff.eval.render.advice import TIERS
from diffeff.eval.render.document import Column, card, chip, document, facts, folded, said, section, sortable
from diffeff.eval.render.inline import inline, shown
from diffeff.eval.render.markup import Markup, element, joined
from diffeff.eval.render.tables import DASH
from diffeff.plan import Plan
from diffeff.presets import PRESETS

__all__ = ["evaluation_page"]

Record = Mapping[str, Any]

_SHARES = frozenset({"adherence", "precision", "recall"})
_FIRST = ("psnr", "fid", "clip", "adherence", "fvd", "kid", "cmmd", "ssim", "lpips")
"""Metrics that become headline cards, most telling first."""
_CARDS = 4


def evaluation_page(report: Record, samples: Sequence[Record] | None = None) -> str:
    """A page of a report of `diffeff eval`. `samples` default to the report's; their files are put into the page.

    A sample is `{"name", "prompt", "subject": path, "reference": path or None}`; a file that is gone is named as such.
    """
    results: Sequence[Record] = report["results"]
    pairs = _samples(report["samples"] if samples is None else samples, report)
    parts = {"In short": section("In short", *_short(report, results))}
    parts["Every number"] = section("Every number", _table(results), said(_notes(report, results)))
    if pairs is not None:
        parts["Samples"] = section("Samples", pairs)
    parts["How it was measured"] = section("How it was measured", *_made(report, results))
    return document(_title(report), "diffeff eval", _meta(report), parts, _FOOTER)


_FOOTER = (
    "Numbers from different features are not comparable: labels name the features, the folded part their checksums. "
    "Made from the report alone; nothing is loaded."
)


def _title(report: Record) -> str:
    return f"Evaluation of {_side(report['subject'])}"


def _side(about: Record | None) -> str:
    """What a side of the comparison is called: a model with its plan, a folder, statistics."""
    if not about:
        return "nothing"
    name = str(about.get("model") or about.get("path") or about.get("name") or about.get("kind") or "?")
    if about.get("plan_digest"):
        return f"{name} with plan {_plan_name(str(about['plan_digest']))}"
    return f"{name}, plain" if about.get("kind") == "plain" else name


def _plan_name(digest: str) -> str:
    """The preset that this plan is; other plans go by their digest."""
    return next((name for name in PRESETS if Plan.preset(name).digest == digest), digest)


def _meta(report: Record) -> list[str]:
    against = f"against {_side(report['reference'])}" if report.get("reference") else "without a reference"
    pairs = f"pixel for pixel with {_side(report['pairs'])}" if report.get("pairs") else ""
    prompts = report.get("prompts") or {}
    count = prompts.get("n") or prompts.get("count") or prompts.get("prompts")
    asked = f"{count or ''} prompts of {prompts.get('name')}".strip() if prompts.get("name") else ""
    took = (report.get("seconds") or {}).get("total")
    minutes = f"{took / 60:.1f} minutes" if took else ""
    return [" · ".join(part for part in (against, pairs, asked, minutes) if part)]


# --- in short -------------------------------------------------------------------------------------------------------
def _short(report: Record, results: Sequence[Record]) -> Iterator[Markup | None]:
    if gates := report.get("gates"):
        yield element("ul", *(_gate(gate) for gate in gates), class_="said")
    ordered = sorted(
        (r for r in results if r["metric"] in _FIRST and _attribute(r) in (None, "all")),
        key=lambda r: _FIRST.index(r["metric"]),
    )
    if ordered:
        yield element("div", *(_card(result) for result in ordered[:_CARDS]), class_="cards")
    yield said([*_closeness(report, results), *_findings(results)])


def _gate(gate: Record) -> Markup:
    sign = chip("gate failed", "no") if gate["failed"] else chip("gate passed", "ok")
    return element("li", sign, " fails if ", element("code", str(gate["gate"])), f": {gate['reason']}")


def _closeness(report: Record, results: Sequence[Record]) -> Iterator[str]:
    """What the PSNR means to the eye, where it is one to plain."""
    plain = next((about for about in (report.get("pairs"), report.get("reference")) if about), None) or {}
    psnr = next((r for r in results if r["metric"] == "psnr" and r["value"] is not None), None)
    if psnr is None or plain.get("kind") != "plain":
        return
    meaning = next((words for floor, words in TIERS if psnr["value"] >= floor), "visibly not plain's result")
    worst = (psnr.get("details") or {}).get("min")
    lowest = f", the worst item {worst:.1f} dB" if worst is not None else ""
    yield f"PSNR {psnr['value']:.1f} dB{lowest}: {meaning}."


def _card(result: Record) -> Markup:
    entries = [("95 % interval", _interval(result) or "none")]
    reference, _ = _beside(result)
    entries += [("reference", _number(result, reference["value"]))] if reference else []
    entries += [("items", str(result["n"]))]
    known = METRICS.get(str(result["metric"]))
    value, unit = _value(result)
    title = f"{result['label']}, {_better(result)}" if result["better"] != "neither" else str(result["label"])
    return card(title, value, unit, "", entries, known.summary if known else "", _mood(result))


def _mood(result: Record) -> str:
    return {"better": "good", "worse": "bad", "unclear": "calm"}.get(_comparison(result) or "", "calm")


def _comparison(result: Record) -> str | None:
    """How a number stands to the reference's own: better, worse, unclear (the intervals say), or None without one."""
    reference, difference = _beside(result)
    if result["better"] == "neither" or reference is None:
        return None
    sign = 1 if result["better"] == "higher" else -1
    if difference is not None:
        low, high = sorted((sign * difference["low"], sign * difference["high"]))
        return "better" if low > 0 else "worse" if high < 0 else "unclear"
    own, other = result.get("interval"), reference.get("interval95")
    if own is None or other is None:
        return None
    below, above = own["high"] < other[0], own["low"] > other[1]
    return "unclear" if not below and not above else "better" if above == (sign > 0) else "worse"


def _beside(result: Record) -> tuple[Record | None, Record | None]:
    details = result.get("details") or {}
    return details.get("reference"), details.get("difference")


def _findings(results: Sequence[Record]) -> Iterator[str]:
    """A sentence for every number that is better or worse than the reference's own, and one for all the others."""
    standings = [(result, _comparison(result)) for result in results]
    yield from (_finding(result, standing) for result, standing in standings if standing in ("better", "worse"))
    if same := [str(result["label"]) for result, standing in standings if standing == "unclear"]:
        yield f"No clear difference to the reference: {', '.join(same)}."


def _finding(result: Record, standing: str | None) -> str:
    reference, difference = _beside(result)
    theirs = _number(result, reference["value"]) if reference else DASH
    value, unit = _value(result)
    line = f"{result['label']}: {value}{' ' + unit if unit else ''} is {standing} than the reference's {theirs}"
    if difference is None:
        return f"{line}."
    numbers = [_number(result, difference[key]) for key in ("value", "low", "high")]
    return f"{line}, difference {numbers[0]} [{numbers[1]}, {numbers[2]}]."


# --- every number ---------------------------------------------------------------------------------------------------
def _table(results: Sequence[Record]) -> Markup:
    compared = any(_beside(result)[0] for result in results)
    columns = [Column("metric", words=True), Column("value"), Column("95 % interval")]
    columns += [Column("reference"), Column("difference")] if compared else []
    columns += [Column("items")]
    return sortable("Every result of this evaluation.", columns, [_row(result, compared) for result in results])


def _row(result: Record, compared: bool) -> Markup:
    (value, unit), label = _value(result), str(result["label"])
    known = METRICS.get(str(result["metric"]))
    sort = "1e999" if result["infinite"] else None if result["value"] is None else repr(result["value"])
    return element(
        "tr",
        element("th", label, element("small", known.summary) if known else None, scope="row", data_value=label),
        element("td", f"{value} {unit}".strip(), element("small", _better(result)), data_value=sort),
        element("td", _interval(result) or DASH, _method(result), _bar(result)),
        *(_compared(result) if compared else ()),
        element("td", str(result["n"]), data_value=str(result["n"])),
    )


def _method(result: Record) -> Markup | None:
    interval = result.get("interval")
    return element("small", str(interval["method"]), class_="note") if interval else None


_STANDINGS = {"unclear": "no clear difference"}


def _compared(result: Record) -> list[Markup]:
    reference, difference = _beside(result)
    standing = _comparison(result)
    kind = {"better": "ok", "worse": "no"}.get(standing or "", "")
    gap = joined([]) if difference is None else joined([_number(result, difference["value"])])
    return [
        element("td", DASH if reference is None else _number(result, reference["value"])),
        element("td", gap, element("div", chip(_STANDINGS.get(standing, standing), kind)) if standing else None),
    ]


def _bar(result: Record) -> Markup | None:
    """A share with its interval as a bar from 0 to 100 %."""
    if result["metric"] not in _SHARES or result["value"] is None:
        return None
    interval = result.get("interval") or {"low": result["value"], "high": result["value"]}
    low, high = 120 * interval["low"], 120 * interval["high"]
    return element(
        "svg",
        element("line", x1="0", x2="120", y1="8", y2="8", class_="base"),
        element("rect", x=low, y="4", width=max(high - low, 1.0), height="8", class_="span"),
        element("rect", x=120 * result["value"] - 1.5, y="2", width="3", height="12", class_="value"),
        viewBox="0 0 120 16",
        width="120",
        height="16",
        class_="bar calm",
        aria_hidden="true",
    )


def _value(result: Record) -> tuple[str, str]:
    """The value as text, and its unit."""
    if result["infinite"]:
        return "identical", ""
    return _number(result, result["value"]), str(result["unit"] or "")


def _number(result: Record, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if result["metric"] in _SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def _interval(result: Record) -> str:
    interval = result.get("interval")
    return "" if not interval else f"{_number(result, interval['low'])} to {_number(result, interval['high'])}"


def _better(result: Record) -> str:
    return {"higher": "higher is better", "lower": "lower is better"}.get(str(result["better"]), "neither")


def _attribute(result: Record) -> str | None:
    return (result.get("details") or {}).get("attribute")


def _notes(report: Record, results: Sequence[Record]) -> Iterator[str]:
    for result in results:
        yield from (f"{result['label']}: {note}" for note in result.get("notes") or ())
    yield from (str(note) for note in report.get("notes") or ())


# --- samples --------------------------------------------------------------------------------------------------------
def _samples(samples: Sequence[Record], report: Record) -> Markup | None:
    if not samples:
        return None
    other = _side(report.get("pairs") or report.get("reference"))
    pairs = [_pair(sample, _side(report["subject"]), other) for sample in samples]
    return element("div", *pairs, class_="pairs")


def _pair(sample: Record, subject: str, reference: str) -> Markup:
    sides = [(sample.get("subject"), subject), (sample.get("reference"), reference)]
    figures = [_figure(str(path), words, str(sample["name"])) for path, words in sides if path]
    heading = element("p", element("b", str(sample["name"])), f" {sample.get('prompt') or ''}")
    return element("article", heading, element("div", *figures), class_="pair")


def _figure(path: str, words: str, name: str) -> Markup:
    found = inline(Path(path))
    if found is None:
        return element("figure", element("p", f"{path} is gone or cannot be shown."), element("figcaption", words))
    note = element("small", found.note) if found.note else None
    return element("figure", shown(found, f"{name}, {words}"), element("figcaption", words, note))


# --- how it was measured --------------------------------------------------------------------------------------------
def _made(report: Record, results: Sequence[Record]) -> Iterator[Markup]:
    for side in ("subject", "reference", "pairs", "prompts"):
        if report.get(side):
            yield folded(side.capitalize(), facts(report[side]))
    sources = {str(r["features"].get("sha256")): r["features"] for r in results if r.get("features")}
    for about in sources.values():
        yield folded(f"Features: {about.get('label') or about.get('spec')}", facts(about))
    details = {str(r["label"]): r["details"] for r in results if r.get("details")}
    if details:
        yield folded("Details of the numbers", facts(details))
    yield folded("Settings", facts(report["settings"]))
    yield folded("Environment and time", facts({**report["environment"], "seconds": report.get("seconds")}))
