"""`diffeff models`: the bundled models and what was measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from diffeff.cli.console import emit, out, table
from diffeff.cli.group import alone
from diffeff.errors import ModelLoadError
from diffeff.zoo import bundled

__all__ = ["build", "models"]

_HELP = """List the bundled models: small, really trained, offline; with their settings and measured scores.

\b
[bold]Examples[/]
diffeff models
diffeff models --json"""


def build() -> typer.Typer:
    """The command."""
    return alone(models, _HELP)


def models(json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON on stdout.")] = False) -> None:
    """The command's work."""
    cards = {name: _card(name) for name in bundled.NAMES}
    if json:
        emit({"models": cards})
        return
    shown = table("model", "pipeline", "settings", "measured: right of trials (95 % interval)")
    for name, card in cards.items():
        scores = "\n".join(_scores(card)) if card else "[yellow]its files are not in this installation[/]"
        shown.add_row(f"[bold]{name}[/]", (card or {}).get("pipeline", "-"), _settings(name) if card else "-", scores)
    out().print(shown)


def _card(name: str) -> dict[str, Any] | None:
    try:
        return bundled.card(name)
    except ModelLoadError:
        return None


def _settings(name: str) -> str:
    best = bundled.recommended(name)
    size = f"\n{best.width}x{best.height}" if best.width else ""
    return f"{best.steps} steps, guidance {best.guidance:g}{size}" + (f", {best.frames} frames" if best.frames else "")


def _scores(card: Mapping[str, Any]) -> Iterator[str]:
    for path, entry in bundled.proportions(card):
        low, high = entry["interval95"]
        yield escape(f"{path} {entry['right']} of {entry['trials']} ({low:.2f} to {high:.2f})")
