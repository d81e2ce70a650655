"""`diffeff inspect`: what diffeff sees in a model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from diffeff.cli.console import emit, out, quiet_libraries, table
from diffeff.cli.group import alone
from diffeff.cli.inspect_memory import show_memory
from diffeff.cli.progress import Stages

if TYPE_CHECKING:
    from diffeff.anatomy.types import DenoiserMap
    from diffeff.pipeline import DiffEffPipeline

__all__ = ["build", "inspect"]

_PANEL = "Memory"
_HELP = """Describe a model: its blocks, its attentions, its guidance, and what each method could act on.

Nothing is changed. A description that was guessed from diffusers' own block metadata, and not written for this
family of models, is marked generic.

\b
[bold]Examples[/]
diffeff inspect sprites-wan
diffeff inspect ./my-model --json
diffeff inspect ./my-model --memory --height 480 --width 832 --frames 81 --budget 24GB"""


def build() -> typer.Typer:
    """The command."""
    return alone(inspect, _HELP)


def inspect(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder, or a hub id.")],
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON on stdout.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", metavar="", help="Estimate the peak memory of a call, stage by stage.")
    ] = False,
    height: Annotated[int | None, typer.Option(min=1, help="Of --memory: pixels.", rich_help_panel=_PANEL)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of --memory: pixels.", rich_help_panel=_PANEL)] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video.", rich_help_panel=_PANEL)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.", rich_help_panel=_PANEL)] = 1,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is no guidance.", rich_help_panel=_PANEL)
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Find the cheapest steps that fit, such as 8GB; or auto.", rich_help_panel=_PANEL),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="A preset or plan file to estimate with.", rich_help_panel=_PANEL)
    ] = None,
) -> None:
    """The command's work."""
    sizes = {"height": height, "width": width, "frames": frames, "batch": batch}
    if memory or budget is not None:
        show_memory(model, sizes, guidance, budget, plan, json)
        return
    with Stages(quiet=json) as stages:
        stages.begin("load " + model)
        quiet_libraries()
        from diffeff.pipeline import DiffEffPipeline

        pipe = DiffEffPipeline.from_pretrained(model, plan="lossless").remove()
        found = _describe(pipe)
    if json:
        emit(found)
    else:
        _show(found)


def _describe(pipe: DiffEffPipeline) -> dict[str, Any]:
    from diffeff.stamp import stamp_of

    described = pipe.denoisers
    stamp = stamp_of(pipe.wrapped, described)
    return {
        "pipeline": type(pipe.wrapped).__name__,
        "family": stamp.family,
        "fingerprint": stamp.fingerprint,
        "scheduler": stamp.scheduler,
        "parameters": {name: _parameters(part) for name, part in pipe.wrapped.components.items() if _parameters(part)},
        "denoisers": [_denoiser(d) for d in described],
        "methods": [_method(name, described[0]) for name in _names()],
    }


def _names() -> list[str]:
    from diffeff.methods.table import TABLE

    return list(TABLE)


def _parameters(part: Any) -> int:
    return sum(p.numel() for p in part.parameters()) if hasattr(part, "parameters") else 0


def _denoiser(denoiser: DenoiserMap) -> dict[str, Any]:
    groups = Counter(block.group for block in denoiser.blocks)
    kinds = Counter((site.kind, site.heads, site.head_dim) for site in denoiser.attentions)
    return {
        "name": denoiser.name,
        "class": type(denoiser.module).__name__,
        "generic": denoiser.generic,
        "blocks": dict(groups),
        "keeps_shape": denoiser.residual,
        "attentions": [
            {"kind": kind, "heads": heads, "head_dim": dim, "count": count}
            for (kind, heads, dim), count in kinds.items()
        ],
        "guidance": denoiser.cfg.value,
        "inputs": {"sample": denoiser.sample, "timestep": denoiser.timestep, "text": denoiser.text},
        "notes": list(denoiser.notes),
    }


def _method(name: str, denoiser: DenoiserMap) -> dict[str, Any]:
    from diffeff.errors import DiffEffError
    from diffeff.methods.table import config_class

    try:
        return {"name": name, "applies": True, "on": config_class(name)().build().inspect(denoiser)}
    except DiffEffError as error:
        return {"name": name, "applies": False, "on": str(error)}


def _show(found: dict[str, Any]) -> None:
    console = out()
    console.print(f"[bold]{found['pipeline']}[/]  family {found['family']}, fingerprint {found['fingerprint']}")
    console.print(f"scheduler {found['scheduler']}")
    sizes = ", ".join(f"{name} {_count(number)}" for name, number in found["parameters"].items())
    console.print(f"parameters: {sizes}")
    for denoiser in found["denoisers"]:
        _show_denoiser(denoiser)
    rows = table("method", "applies", "what it could act on, or why not")
    for method in found["methods"]:
        rows.add_row(method["name"], "yes" if method["applies"] else "[red]no[/]", escape(method["on"]))
    console.print()
    console.print(rows)


def _show_denoiser(denoiser: dict[str, Any]) -> None:
    console = out()
    guessed = "  [yellow]generic: guessed, not written for this family[/]" if denoiser["generic"] else ""
    console.print(f"\n[bold]{denoiser['name']}[/]  {denoiser['class']}{guessed}")
    console.print("  blocks: " + ", ".join(f"{count} {group}" for group, count in denoiser["blocks"].items()))
    for site in denoiser["attentions"]:
        console.print(f"  attention: {site['count']} {site['kind']}, {site['heads']} heads of {site['head_dim']}")
    console.print(f"  guidance: {denoiser['guidance']}")
    for note in denoiser["notes"]:
        console.print(f"  note: {escape(note)}")


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
