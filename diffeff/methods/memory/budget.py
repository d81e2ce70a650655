"""Bytes in words, and how many slices a budget asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffeff.errors import ConfigError

__all__ = ["Share", "parse_bytes"]

_UNITS = {"B": 1, "": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """A number of bytes written as `"8GB"` (8e9), `"8GiB"` (8 * 2**30), `"512MB"` or a plain number.

    Raises ConfigError for anything else, and for less than one byte.
    """
    found = None if isinstance(text, bool) else _SIZE.fullmatch(str(text))
    unit = found.group(2).upper() if found else "?"
    value = int(float(found.group(1)) * _UNITS[unit]) if found and unit in _UNITS else 0
    if value < 1:
        raise ConfigError(f"{text!r} is no amount of memory; allowed: such as '8GB', '8GiB', '512MB' or plain bytes")
    return value


@dataclass(frozen=True)
class Share:
    """What a model may use for its activations: a number of bytes, or a given number of slices.

    Without either nothing is sliced for a budget: each group falls back on its own default.
    """

    activation_bytes: int | None
    slices: int | None

    def count(self, items: int, bytes_per_item: int, whole: int = 0) -> int:
        """How many slices to cut `items` into.

        `slices`, clamped to 1..items, where it is set; else the fewest so that `whole` and one slice of
        ceil(items / n) items at `bytes_per_item` stay within `activation_bytes`, at most `items`; 1 without a budget.
        """
        if items < 1:
            return 1
        if self.slices is not None:
            return min(max(self.slices, 1), items)
        if self.activation_bytes is None:
            return 1
        fitting = (self.activation_bytes - whole) // max(bytes_per_item, 1)
        return items if fitting < 1 else -(-items // min(fitting, items))
