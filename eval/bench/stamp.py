"""What ties the rows of one run together: its name, its time, and the commit it was measured at."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

from diffeff.eval.bench.rows import commit

__all__ = ["run_stamp"]


def run_stamp() -> dict[str, str | None]:
    """`run` (UTC time and four hex digits), `when` (ISO time) and `commit` (None outside a checkout)."""
    when = datetime.now(UTC)
    run = f"{when:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    return {"run": run, "when": when.isoformat(timespec="seconds"), "commit": commit()}
