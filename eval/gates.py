"""Gates: conditions on results that make an evaluation fail, such as `psnr<30` in a continuous-integration job."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffeff.errors import ConfigError, UnknownName, nearest
from diffeff.eval.metrics.result import Result

__all__ = ["PARTS", "Gate", "Verdict", "judge", "parse_gates"]

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"^\s*([A-Za-z_][\w.]*)\s*(<=|>=|<|>)\s*(\S+)\s*$")
PARTS = ("low", "high", "min", "max")
"""What may stand behind a metric's name: an end of its 95 % interval, its worst or best single item."""


@dataclass(frozen=True)
class Gate:
    """The evaluation fails when `metric` stands to `limit` as `sign` says: `psnr<30`, `adherence.colour<0.9`.

    `part` chooses an end of the interval (`fid.high>20`) or the extreme item (`psnr.min<25`) in place of the value.
    """

    text: str
    metric: str
    part: str | None
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a gate. Raises ConfigError that shows the form."""
        match = _FORM.match(text)
        limit = _number(match[3]) if match else None
        if match is None or limit is None:
            raise ConfigError(
                f"the gate {text!r} cannot be read; expected METRIC<NUMBER with one of < <= > >=, such as "
                f'"psnr<30" or "fid>12.5", or METRIC.PART with one of {", ".join(PARTS)}'
            )
        name, dot, part = match[1].rpartition(".")
        metric, chosen = (name, part) if dot and part in PARTS else (match[1], None)
        return cls(text.strip(), metric, chosen, match[2], limit)

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Whether the gate fails on these results. A value that is missing, or not a number, fails it."""
        found = next((r for r in results if _name(r) == self.metric), None)
        value = math.nan if found is None else self._value(found)
        if math.isnan(value):
            return Verdict(self, value, True, f"{self.subject} has no value")
        failed = _OPERATORS[self.sign](value, self.limit)
        return Verdict(self, value, failed, f"{self.subject} is {value:.6g}")

    @property
    def subject(self) -> str:
        """What is looked at: `psnr`, `psnr.min`."""
        return f"{self.metric}.{self.part}" if self.part else self.metric

    def _value(self, result: Result) -> float:
        if self.part in ("low", "high"):
            return math.nan if result.interval is None else float(getattr(result.interval, self.part))
        value = result.value if self.part is None else result.details.get(self.part, math.nan)
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Verdict:
    """One gate and what came of it. The value may be infinite: identical clips have no finite PSNR."""

    gate: Gate
    value: float
    failed: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a value JSON cannot hold is null, `reason` says it in words."""
        value = self.value if math.isfinite(self.value) else None
        return {"gate": self.gate.text, "value": value, "failed": self.failed, "reason": self.reason}


def parse_gates(texts: Iterable[str], metrics: Sequence[str]) -> tuple[Gate, ...]:
    """All gates of a command line; one text may hold several, comma-separated.

    Raises ConfigError for one that cannot be read, UnknownName for one on a metric that is not asked for, both before
    anything is computed.
    """
    gates = tuple(Gate.parse(part) for text in texts for part in text.split(","))
    for gate in gates:
        if gate.metric.partition(".")[0] not in metrics:
            raise UnknownName(
                f"the gate {gate.text!r} is about {gate.metric!r}, which is not among the metrics of this evaluation. "
                f"{nearest(gate.metric, metrics)} Add it to --metrics."
            )
    return gates


def judge(gates: Sequence[Gate], results: Sequence[Result]) -> tuple[Verdict, ...]:
    """The verdicts in the order of the gates."""
    return tuple(gate.judge(results) for gate in gates)


def _name(result: Result) -> str:
    """`psnr`; for a metric with several lines `adherence.colour`, and `adherence` for all attributes together."""
    attribute = result.details.get("attribute", "all")
    return result.metric if attribute == "all" else f"{result.metric}.{attribute}"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
