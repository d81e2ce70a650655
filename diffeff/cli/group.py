"""The command group: exit codes in one place, and modules of commands loaded when they are called."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from diffeff.cli.console import complain, err, start_logging
from diffeff.errors import DiffEffError, OutputError

__all__ = ["BAD_INPUT", "EPILOG", "GATE_FAILED", "INTERRUPTED", "NO_OUTPUT", "LateCommands", "alone"]

BAD_INPUT, NO_OUTPUT, GATE_FAILED, INTERRUPTED = 3, 4, 5, 130
EPILOG = (
    "Exit codes: 0 ok, 1 unexpected error, 2 wrong usage, 3 bad input, plan or model, 4 output cannot be "
    "written, 5 a gate of --fail-if failed, 130 interrupted."
)


def alone(function: Callable[..., None], text: str) -> typer.Typer:
    """An app of one command, as a command module's `build` returns it."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(help=text, epilog=EPILOG)(function)
    return app


class LateCommands(TyperGroup):
    """Turns diffeff's errors into one line and an exit code, and builds a command when it is called."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--debug` from wherever it stands: nobody recalls on which side of the command it belongs."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta["diffeff.debug"] = "--debug" in args[:cut] or bool(os.environ.get("DIFFEFF_DEBUG"))
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > cut])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its stub: its module, and what that imports, are only loaded here."""
        name, stub, rest = super().resolve_command(ctx, args)
        if name is None or stub is None:
            return name, stub, rest
        command = typer.main.get_command(import_module(f"diffeff.cli.{name.replace('-', '_')}").build())
        command.name = name
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.meta["diffeff.debug"])
        start_logging(debug)
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            err().print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except DiffEffError as error:
            if debug:
                err().print(traceback.format_exc(), markup=False)
            complain("Error", str(error))
            raise typer.Exit(NO_OUTPUT if isinstance(error, OutputError) else BAD_INPUT) from error


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our warnings as one line; those of libraries, which the user of a command cannot act on, not at all."""
    from diffeff.errors import DiffEffWarning

    if issubclass(category, DiffEffWarning):
        complain("Warning", str(message))
