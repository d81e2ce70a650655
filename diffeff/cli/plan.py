"""`diffeff plan`: look at a plan before anything is applied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from diffeff.cli.console import emit, out, quiet_libraries, table
from diffeff.cli.group import BAD_INPUT, EPILOG
from diffeff.presets import PRESETS

if TYPE_CHECKING:
    from diffeff.plan import Plan, PlanCheck

__all__ = ["build", "check", "show"]

_CHECK = """Read a plan file strictly, and with -m say what each method would act on in that model.

Unknown keys and values outside their range are errors that name the nearest match. With a model, conflicts
between methods and methods that find nothing to act on are errors, too.

\b
[bold]Examples[/]
diffeff plan check plan.json
diffeff plan check plan.json -m sprites-wan"""

_SHOW = """Print a plan as JSON, as a plan file holds it: a preset's name or a file.

\b
[bold]Examples[/]
diffeff plan show balanced > plan.json
diffeff plan show plan.json"""

Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON on stdout.")]


def build() -> typer.Typer:
    """The command and its two subcommands."""
    presets = "\n".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    app = typer.Typer(
        help="Check or show a plan before anything is applied.\n\n\b\n[bold]Presets[/]\n" + escape(presets),
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.command("check", help=_CHECK, epilog=EPILOG)(check)
    app.command("show", help=_SHOW, epilog=EPILOG)(show)
    return app


def check(
    file: Annotated[str, typer.Argument(help="A plan file, or the name of a preset.")],
    model: Annotated[str | None, typer.Option("-m", "--model", help="Check against this model.")] = None,
    json: Json = False,
) -> None:
    """The work of `plan check`."""
    from diffeff.plan import Plan

    plan = Plan.of(file if file in PRESETS else Path(file))
    rows = [] if model is None else _against(plan, model)
    good = all(row.applies for row in rows)
    if json:
        checks = [{"method": row.method, "applies": row.applies, "reason": row.reason} for row in rows]
        emit({"ok": good, "digest": plan.digest, "model": model, "plan": plan.to_dict(), "checks": checks})
    else:
        _print(plan, rows, model)
    if not good:
        raise typer.Exit(BAD_INPUT)


def show(
    plan: Annotated[str, typer.Argument(help="The name of a preset, or a plan file.")],
) -> None:
    """The work of `plan show`."""
    from diffeff.plan import Plan

    emit(Plan.of(plan).to_dict())


def _against(plan: Plan, model: str) -> list[PlanCheck]:
    quiet_libraries()
    from diffeff.pipeline import DiffEffPipeline

    pipe = DiffEffPipeline.from_pretrained(model, plan="lossless")
    return plan.check(pipe.remove().denoisers)


def _print(plan: Plan, rows: list[PlanCheck], model: str | None) -> None:
    console = out()
    console.print(escape(str(plan)))
    if model is None:
        console.print("The plan reads well. Give -m MODEL to see what it would act on and whether its methods agree.")
        return
    shown = table("method", "applies", "what it acts on, or why not")
    for row in rows:
        shown.add_row(row.method, "yes" if row.applies else "[red]no[/]", escape(row.reason))
    console.print(shown)
