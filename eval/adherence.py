"""Whether a plan's results still show what was asked for: attributes read from the pixels, beside the plain run's.

`python -m diffeff.eval.adherence sprites-wan plan.json --limit 200 >> eval/results/adherence.jsonl` generates every
prompt plain and under the plan at the same seed and prints one JSON line: PSNR to plain with its interval, and for each
attribute and for all together how many results show it, with Wilson intervals, in both. `--report` makes the line from
a report that `diffeff eval` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffeff.eval.bench.stamp import run_stamp
from diffeff.eval.evaluate import EvalSettings, evaluate
from diffeff.plan import Plan

__all__ = ["row"]


def row(report: Mapping[str, Any], plan: str) -> dict[str, Any]:
    """What a report of `diffeff eval` says of adherence, as one JSON-ready row."""
    found = {(r["metric"], r["details"].get("attribute")): r for r in report["results"]}
    psnr = found["psnr", None]
    return {
        "benchmark": "adherence",
        "model": report["subject"]["model"],
        "plan": plan,
        "prompts": report["prompts"]["n"],
        "psnr": {"mean": psnr["value"], **_ends(psnr["interval"]), "worst": psnr["details"]["min"]},
        "attributes": {name: _counts(r) for (metric, name), r in found.items() if metric == "adherence"},
        "call": report["subject"]["call"],
        "environment": {name: report["environment"][name] for name in ("diffeff", "torch", "diffusers", "python")},
        **run_stamp(),
    }


def _counts(result: Mapping[str, Any]) -> dict[str, Any]:
    plain = result["details"]["reference"]
    low, high = plain["interval95"]
    return {
        "right": result["details"]["right"],
        **_ends(result["interval"]),
        "plain": {"right": plain["right"], "low": low, "high": high},
    }


def _ends(interval: Mapping[str, float]) -> dict[str, float]:
    return {"low": interval["low"], "high": interval["high"]}


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="prompts (default: 200)")
    parser.add_argument("--report", type=Path, help="a report that is there already")
    options = parser.parse_args()
    if options.report is not None:
        report = json.loads(options.report.read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = _evaluated(options.model, Plan.load(options.plan), options.limit, Path(folder))
    sys.stdout.write(json.dumps(row(report, options.plan.name)) + "\n")


def _evaluated(model: str, plan: Plan, limit: int, folder: Path) -> Mapping[str, Any]:
    metrics = ("psnr", "adherence")
    return evaluate(
        EvalSettings(subject=model, plan=plan, limit=limit, metrics=metrics, out=folder / "report.json")
    ).report


if __name__ == "__main__":
    main()
