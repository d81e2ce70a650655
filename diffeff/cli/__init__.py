"""The command line. `main` is what the console script `diffeff` and `python -m diffeff` call.

Each command is a module of this package with a `build()` that returns its typer app. A module is loaded when
its command is called, so that `diffeff --help` takes no longer than python itself.
"""

from __future__ import annotations

from typing import Annotated

import typer

from diffeff.cli.group import EPILOG, LateCommands

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = {
    "generate": "Make a clip or a picture from a prompt; with --compare, show what a plan buys and costs.",
    "tune": "Find the fastest plan that keeps a fidelity target on your model; measure and save it.",
    "train-router": "Learn, without data, which module to compute at which step; save it as a plan (HarmoniCa).",
    "eval": "Measure a folder, or a model with a plan: fidelity, FID, KID, CLIP score, adherence; gates for CI.",
    "bench": "Measure plans beside other acceleration tools and fewer steps; matrix, scaling, HTML report.",
    "inspect": "Describe a model: its blocks, its attentions, and what each method could act on.",
    "plan": "Check or show a plan before anything is applied.",
    "methods": "List the methods with their options and ranges.",
    "models": "List the bundled models and how well they follow their prompts.",
    "doctor": "Look at this installation: versions, devices, kernels, optional packages, known traps.",
}

_HELP = """Make diffusers pipelines faster, smaller and more controllable, and see what that costs.

\b
[bold]First steps[/] (offline, on any CPU)
diffeff generate "a red circle moving left, camera pans right" --compare
diffeff methods
diffeff inspect sprites-wan
diffeff generate "a blue cross moving up, camera static" --feature-cache.interval 3

Every command has its own --help. With --json a command prints one JSON object on stdout, all else on stderr."""

app = typer.Typer(
    cls=LateCommands,
    help=_HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from diffeff import __version__

        typer.echo(f"diffeff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show the version and leave."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", metavar="", help="Show tracebacks and the full log; works after the command's name, too."
        ),
    ] = False,
) -> None:
    pass


def _stub() -> None:
    """Stands in for a command until it is called."""


for _name, _text in COMMANDS.items():
    app.command(_name, help=_text)(_stub)


def main() -> None:
    """Run the command line and leave with its exit code."""
    app(prog_name="diffeff")
