"""The report of an evaluation as files: JSON for programs, Markdown and CSV for people, HTML for the eye."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffeff.files import write_text

__all__ = ["cells", "items_csv", "number", "results_csv", "results_markdown", "write_report"]

Row = Mapping[str, Any]
Values = Sequence[float | None]

_COLUMNS = (
    "metric",
    "label",
    "value",
    "unit",
    "better",
    "n",
    "low",
    "high",
    "interval",
    "reference",
    "difference",
    "difference_low",
    "difference_high",
    "features",
    "features_sha256",
    "notes",
)


def write_report(
    out: Path, html: Path | None, report: Mapping[str, Any], names: Sequence[str], items: Mapping[str, Values]
) -> dict[str, Path]:
    """Write all files of a report, each whole or not at all; the JSON comes last, so its presence means all are there.

    Returns them by kind. Raises OutputError.
    """
    plain: dict[str, Any] = _json_ready(report)
    files = {
        "csv": write_text(out.with_suffix(".csv"), results_csv(plain)),
        "items": write_text(out.with_suffix(".items.csv"), items_csv(names, items)),
        "markdown": write_text(out.with_suffix(".md"), results_markdown(plain)),
    }
    if html is not None:
        from diffeff.eval.render.page import evaluation_page

        files["html"] = write_text(html, evaluation_page(plain, plain["samples"]))
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    return {"json": write_text(out, text + "\n"), **files}


def results_markdown(report: Mapping[str, Any]) -> str:
    """A page: the results in a table, gates, notes, and what was compared."""
    head = ["metric", "value", "95 % interval", "n", "reference", "difference", ""]
    rows = [_row(head), _row(["---", "--:", "---", "--:", "--:", "--:", "---"])]
    rows += [_row(cells(result)) for result in report["results"]]
    gates = [
        f"- gate `{g['gate']}`: {'**failed**' if g['failed'] else 'passed'} ({g['reason']})" for g in report["gates"]
    ]
    notes = [f"- {result['label']}: {note}" for result in report["results"] for note in result["notes"]]
    notes += [f"- {note}" for note in report["notes"]]
    parts = [f"# {_title(report)}", "\n".join(rows), "\n".join(gates), "\n".join(notes), "\n".join(_facts(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def results_csv(report: Mapping[str, Any]) -> str:
    """One line a result. Identical items have an infinite PSNR: `inf`."""
    rows = []
    for result in report["results"]:
        interval, details, features = result["interval"] or {}, result["details"], result["features"] or {}
        reference, difference = details.get("reference") or {}, details.get("difference") or {}
        rows.append(
            {key: result[key] for key in ("metric", "label", "unit", "better", "n")}
            | {"metric": _metric(result), "value": "inf" if result["infinite"] else result["value"]}
            | {"low": interval.get("low"), "high": interval.get("high"), "interval": interval.get("method")}
            | {"reference": reference.get("value"), "difference": difference.get("value")}
            | {"difference_low": difference.get("low"), "difference_high": difference.get("high")}
            | {"features": features.get("spec"), "features_sha256": features.get("sha256")}
            | {"notes": "; ".join(result["notes"])}
        )
    return _table(_COLUMNS, rows)


def items_csv(names: Sequence[str], items: Mapping[str, Values]) -> str:
    """One line an item with its number for each metric that has one."""
    rows = [
        {"item": name, **{metric: "" if values[i] is None else values[i] for metric, values in items.items()}}
        for i, name in enumerate(names)
    ]
    return _table(("item", *items), rows)


def _table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _metric(result: Row) -> str:
    """`adherence.colour`, as gates name it."""
    attribute = result["details"].get("attribute")
    return result["metric"] if attribute in (None, "all") else f"{result['metric']}.{attribute}"


def cells(result: Row) -> list[str]:
    """What a table shows of one result."""
    unit = f" {result['unit']}" if result["unit"] else ""
    interval, details = result["interval"], result["details"]
    reference, difference = details.get("reference"), details.get("difference")
    better = {"higher": "higher is better", "lower": "lower is better"}.get(result["better"], "")
    return [
        result["label"],
        ("identical" if result["infinite"] else number(result["value"])) + ("" if result["infinite"] else unit),
        "" if interval is None else f"{number(interval['low'])} to {number(interval['high'])}",
        str(result["n"]),
        "" if reference is None else number(reference["value"]),
        "" if difference is None else _difference(difference),
        better,
    ]


def _difference(found: Row) -> str:
    return f"{_signed(found['value'])} ({_signed(found['low'])} to {_signed(found['high'])})"


def _signed(value: float) -> str:
    return number(value) if value < 0 else f"+{number(value)}"


def number(value: float | None) -> str:
    """Four significant digits; `-` for what is no number."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def _title(report: Mapping[str, Any]) -> str:
    subject = report["subject"]
    name = subject.get("model") or subject.get("path")
    plan = f", plan {subject['plan_digest']}" if subject.get("plan_digest") else ""
    return f"Evaluation of {name}{plan}"


def _facts(report: Mapping[str, Any]) -> list[str]:
    """What was compared with what, and by which versions."""
    lines = []
    for side in ("subject", "reference", "pairs"):
        about = report.get(side)
        if about:
            shown = (
                "kind",
                "model",
                "path",
                "fingerprint",
                "plan_digest",
                "items",
                "sha256",
                "seed",
                "pixels",
                "origin",
            )
            lines.append(f"- {side}: " + ", ".join(f"{k} {about[k]}" for k in shown if about.get(k) is not None))
    if report["prompts"]:
        lines.append("- prompts: " + ", ".join(f"{k} {v}" for k, v in report["prompts"].items()))
    sources = {r["features"]["sha256"]: r["features"] for r in report["results"] if r["features"]}
    for about in sources.values():
        lines.append("- features: " + ", ".join(f"{k} {v}" for k, v in about.items() if v is not None))
    return [*lines, "- " + ", ".join(f"{k} {v}" for k, v in report["environment"].items() if v)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _json_ready(value: Any) -> Any:
    """A number that JSON cannot hold becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
