"""What importing diffeff costs next to importing diffusers: `python -m diffeff.eval.import_cost`, one JSON line.

Protocol: each statement runs in a fresh interpreter of its own; the statements take turns, in reversed order every
other round, after one round untimed that warms the file cache. A time is CPU seconds; a ratio is the median over
rounds of that round's ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version

from diffeff import __version__

__all__ = ["STATEMENTS", "compare", "seconds"]

STATEMENTS = {
    "import diffeff": "import diffusers",
    "from diffeff import DiffEffPipeline": "from diffusers import DiffusionPipeline",
}
"""What a user of diffeff writes, and what a user of plain diffusers writes instead."""

# CPU time: an import is one thread of Python, and the time on the wall of a busy machine says little about it.
_TIMED = "import time; start = time.process_time(); {}; print(time.process_time() - start)"


def seconds(statement: str) -> float:
    """CPU time of one statement in a fresh interpreter, without the interpreter's own start."""
    command = [sys.executable, "-c", _TIMED.format(statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def compare(rounds: int) -> dict[str, list[float]]:
    """CPU seconds per statement, one per round."""
    statements = [statement for pair in STATEMENTS.items() for statement in pair]
    for statement in statements:
        seconds(statement)
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for turn in range(rounds):
        for statement in statements if turn % 2 == 0 else reversed(statements):
            times[statement].append(seconds(statement))
    return times


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = min(values), statistics.median(values), max(values)
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def record(times: dict[str, list[float]]) -> dict[str, object]:
    """The measurement as it is kept: seconds and ratios with their spread, versions, machine."""
    ratios = {
        ours: _spread([a / b for a, b in zip(times[ours], times[theirs], strict=True)])
        for ours, theirs in STATEMENTS.items()
    }
    return {
        "benchmark": "import_cost",
        "rounds": len(times["import diffeff"]),
        "cpu_seconds": {statement: _spread(values) for statement, values in times.items()},
        "ratio_to_diffusers": ratios,
        "versions": {
            "diffeff": __version__,
            **{name: version(name) for name in ("diffusers", "transformers", "torch")},
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m diffeff.eval.import_cost", description="Cost of `import diffeff`.")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    print(json.dumps(record(compare(rounds))))


if __name__ == "__main__":
    main()
