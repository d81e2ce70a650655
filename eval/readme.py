"""Keeps the generated parts of README.md true: `python -m diffeff.eval.readme` rewrites them, a test compares.

Each part stands between `<!-- NAME -->` and `<!-- /NAME -->`: families and methods from the code, presets from the
presets, models from the bundled cards, results from the JSON lines under `eval/results/`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffeff.anatomy.table import families
from diffeff.eval.trade import render
from diffeff.files import write_text
from diffeff.methods.table import config_classes
from diffeff.plan import Plan
from diffeff.presets import PRESETS
from diffeff.zoo import bundled

__all__ = ["ROOT", "latest", "update"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"


def update(text: str) -> str:
    """`text` with every generated part made anew. Raises KeyError for a marker nobody fills."""
    for name in re.findall(r"<!-- (\w[\w-]*) -->", text):
        part = _PARTS[name]()
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, _fill(part), text, flags=re.DOTALL)
    return text


def _fill(part: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{part}\n{found[2]}"


def latest(model: str, file: Path | None = None) -> list[dict[str, Any]]:
    """The newest set of rows of one model in the trade results: from its last plain row on."""
    lines = (file or RESULTS / "trade.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["model"] == model]
    start = max(i for i, row in enumerate(rows) if row["arm"] == "plain")
    return rows[start:]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _families() -> str:
    return _table(["family", "denoiser classes", "guidance"], [[r.title, r.classes, r.guidance] for r in families()])


def _methods() -> str:
    rows = [[f"`{name}`", config.summary] for name, config in config_classes().items()]
    return _table(["method", "what it buys"], rows)


def _presets() -> str:
    rows = [[f"`{name}`", preset.summary, _one_line(Plan.preset(name))] for name, preset in PRESETS.items()]
    return _table(["preset", "for", "holds"], rows)


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
    return _table(["model", "pipeline", "scores on held-out captions or classes"], rows)


def _scores(card: dict[str, Any]) -> str:
    return ", ".join(_proportion(name, entry) for name, entry in bundled.proportions(card))


def _proportion(name: str, entry: Mapping[str, Any]) -> str:
    low, high = entry["interval95"]
    label = "" if name == "scores" else f"{name} "
    return f"{label}{entry['right']} of {entry['trials']} [{100 * low:.0f} to {100 * high:.0f} %]"


def _results(model: str) -> Callable[[], str]:
    return lambda: render(latest(model))


_PARTS: dict[str, Callable[[], str]] = {
    "families": _families,
    "methods": _methods,
    "presets": _presets,
    "models": _models,
    "trade-sprites-wan": _results("sprites-wan"),
    "trade-sprites-motion": _results("sprites-motion"),
}


def main() -> None:
    """Rewrite README.md in place."""
    readme = ROOT / "README.md"
    write_text(readme, update(readme.read_text("utf-8")))
    sys.stderr.write(f"updated {readme.name}\n")


if __name__ == "__main__":
    main()
