"""`diffeff methods`: what there is to put into a plan, from the configs themselves."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from diffeff.cli.console import emit, out, table
from diffeff.cli.group import alone
from diffeff.core.config import Config, Knob, knobs

__all__ = ["build", "describe", "methods"]

_HELP = """List the methods with their options and ranges, or one method in full.

\b
[bold]Examples[/]
diffeff methods
diffeff methods feature_cache
diffeff methods --json"""


def build() -> typer.Typer:
    """The command."""
    return alone(methods, _HELP)


def methods(
    name: Annotated[str | None, typer.Argument(help="Show only this method, with its options.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON on stdout.")] = False,
) -> None:
    """The command's work."""
    from diffeff.methods.table import config_class, config_classes

    chosen = config_classes() if name is None else {name: config_class(name)}
    if json:
        emit({"methods": [describe(config) for config in chosen.values()]})
        return
    for config in chosen.values():
        _show(config)
    if name is None:
        out().print("\nOn the command line an option is --METHOD.OPTION VALUE, such as --feature-cache.interval 3.")


def describe(config: type[Config]) -> dict[str, Any]:
    """A method as JSON: name, layer, summary, options."""
    return {
        "name": config.name,
        "layer": config().build().layer.name.lower(),
        "summary": config.summary,
        "options": [_option(knob) for knob in knobs(config)],
    }


def _option(knob: Knob) -> dict[str, Any]:
    return {
        "name": knob.name,
        "type": knob.type.__name__,
        "default": knob.default,
        "low": knob.low,
        "high": knob.high,
        "step": knob.step,
        "choices": list(knob.choices),
        "optional": knob.optional,
        "help": knob.help,
    }


def _show(config: type[Config]) -> None:
    console = out()
    console.print(f"\n[bold]{config.name}[/]  {escape(config.summary)}")
    rows = table("  option", "default", "allowed", "what it does")
    for knob in knobs(config):
        rows.add_row(f"  {knob.name}", escape(str(knob.default)), escape(knob.range), escape(knob.help))
    console.print(rows)
