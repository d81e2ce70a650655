"""`diffeff tune`: find the plan that meets a target on a model, measure it, and save it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from diffeff.cli.console import emit, err, out, quiet_libraries, table
from diffeff.cli.flags import command
from diffeff.cli.group import GATE_FAILED, alone
from diffeff.cli.request import DEFAULT_MODEL, DEVICES, DTYPES, placement
from diffeff.cli.searching import following, option, subject
from diffeff.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from diffeff.pipeline import DiffEffPipeline
    from diffeff.search.points import Point, Tuned

__all__ = ["Request", "build", "tune"]

HELP = """Find the fastest plan that keeps a fidelity target on a model, measure it, and save it.

Combines fewer steps, scheduled caching, skipped guidance and fitted solvers. What is found on a few prompts is \
measured on other seeds, in turns with the plain model. Stopped, the same command goes on where it was. Exit code 5 \
says that the target cannot be met; what can be is printed.

\b
[bold]Examples[/]
diffeff tune sprites-wan --min-psnr 30 --save plan.json
diffeff tune sprites-wan --min-speedup 3 --plot front.png
diffeff tune ./my-model --min-psnr 35 --prompts prompts.txt --steps 30 --save plan.json
diffeff generate "a red circle moving left, camera static" --plan plan.json"""

_TARGET, _CALL, _SEARCH, _FILES = "Target", "Call of the model", "Search", "Result and files"


@dataclass(frozen=True)
class Request:
    """The fields are the arguments and options of the command."""

    model: Annotated[str, typer.Argument(help="A bundled model (diffeff models), a folder, or a hub id.")] = (
        DEFAULT_MODEL
    )
    min_psnr: Annotated[float | None, option("Lowest PSNR to the plain run, dB; 30 if no target.", _TARGET)] = None
    min_speedup: Annotated[float | None, option("Or the lowest speed-up, at the best PSNR.", _TARGET)] = None
    prompts: Annotated[str | None, option("A file, or a built-in set: sprites, general.", _CALL)] = None
    limit: Annotated[int, option("Prompts to tune on.", _CALL, min=1)] = 4
    seed: Annotated[int, option("Seed of the first prompt.", _CALL, min=0)] = 0
    steps: Annotated[int | None, option("Steps of the plain run; the model's own if left out.", _CALL, min=1)] = None
    guidance: Annotated[float | None, option("Classifier-free guidance scale.", _CALL)] = None
    size: Annotated[str | None, option("Width and height in pixels.", _CALL, metavar="WxH")] = None
    frames: Annotated[int | None, option("Frames of a video.", _CALL, min=1)] = None
    families: Annotated[
        str | None, option("What may be combined: steps, preset, guidance, schedule, solver; all.", _SEARCH)
    ] = None
    rounds: Annotated[int, option("Rounds of measuring on fresh seeds.", _SEARCH, min=1)] = 1
    swaps: Annotated[int, option("Most trials of moving steps, per schedule.", _SEARCH, min=0)] = 24
    device: Annotated[DEVICES, option("auto takes cuda, then mps, then cpu.", _SEARCH)] = "auto"
    dtype: Annotated[DTYPES, option("auto is bfloat16 on cuda and float32 elsewhere.", _SEARCH)] = "auto"
    save: Annotated[Path | None, option("Plan file to write.", _FILES)] = None
    plot: Annotated[Path | None, option("PNG of the Pareto front.", _FILES)] = None
    work: Annotated[Path | None, option("File in which results are kept, to go on after a stop.", _FILES)] = None
    json: Annotated[bool, option("Print the result as JSON on stdout.", _FILES, "--json", metavar="")] = False


def build() -> typer.Typer:
    """The command."""
    return alone(command(Request, tune, {}), HELP)


def tune(request: Request, given: dict[str, Any]) -> None:
    """The command's work."""
    _check(request)
    quiet_libraries()
    from diffeff.pipeline import DiffEffPipeline

    device, dtype = placement(request.device, request.dtype)
    import torch

    pipe = DiffEffPipeline.from_pretrained(request.model, dtype=getattr(torch, dtype))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    with following(request.json) as observe:
        tuned = _tuned(request, pipe, observe)
    _finish(request, tuned)
    if not tuned.met:
        raise typer.Exit(GATE_FAILED)


def _check(request: Request) -> None:
    """What cannot work is said before any work."""
    if request.min_psnr is not None and request.min_speedup is not None:
        raise ConfigError("--min-psnr and --min-speedup exclude each other; give one")
    if request.plot is not None and request.plot.suffix.lower() != ".png":
        raise OutputError(f"--plot {request.plot}: only .png is written")
    if request.plot is not None:
        from diffeff.eval.render.plots import library

        library()
    for path in (request.save, request.plot):
        if path is not None and path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder")


def _tuned(request: Request, pipe: DiffEffPipeline, observe: Callable[[float, str], None]) -> Tuned:
    prompts, call = subject(request, pipe)
    families = tuple(f.strip() for f in (request.families or "").split(",") if f.strip())
    work = request.work or Path(tempfile.gettempdir()) / "diffeff-tune.work.jsonl"
    target = {"min_psnr": request.min_psnr, "min_speedup": request.min_speedup}
    if request.min_psnr is None and request.min_speedup is None:
        target["min_psnr"] = 30.0
    try:
        return pipe.tune(
            prompts,
            **target,
            call=call,
            seeds=[request.seed + n for n in range(len(prompts))],
            **({"families": families} if families else {}),
            swaps=request.swaps,
            timed_rounds=request.rounds,
            work=work,
            observe=observe,
        )
    except KeyboardInterrupt:
        err().print(f"What is finished is kept in {work}; the same command goes on from there.", markup=False)
        raise


# --- output ----------------------------------------------------------------------------------------------------------
def _finish(request: Request, tuned: Tuned) -> None:
    written = {}
    if request.save is not None and tuned.met:
        written["plan"] = str(tuned.plan.save(request.save))
    if request.plot is not None:
        from diffeff.eval.render.plots import save
        from diffeff.eval.render.tune_plot import tune_plot

        written["plot"] = str(save(tune_plot(tuned.to_dict(), f"{request.model}: {tuned.target}"), request.plot))
    if request.json:
        emit(tuned.to_dict() | {"model": request.model, "files": written})
        return
    console = out()
    console.print(_table(tuned))
    for note in tuned.notes:
        console.print(f"[dim]note: {escape(note)}[/]")
    console.print(escape(tuned.message))
    for name, path in written.items():
        console.print(f"{name}  [bold]{escape(path)}[/]")


def _table(tuned: Tuned) -> Table:
    shown = table("", "candidate", "steps", "computed", "speed-up", "PSNR to plain", "worst")
    best = {id(p) for p in tuned.front}
    for point in sorted(tuned.points, key=lambda p: p.speedup):
        mark = "[bold]>[/]" if point is tuned.chosen else "*" if id(point) in best else ""
        shown.add_row(mark, escape(point.candidate.label), str(point.candidate.steps), *_cells(point))
    shown.caption = "> chosen, * on the Pareto front; ~ on the tuning seeds, not timed"
    return shown


def _cells(point: Point) -> list[str]:
    share, found = f"{100 * point.share:.0f} %", point.measured
    if point.candidate.kind == "plain":
        return [share, "1", "reference", ""]
    if found is None:
        return [share, f"~{point.expected_speedup:.2f}x", f"~{point.psnr:.1f} dB", ""]
    speed = f"{found.speedup:.2f}x ({found.speedup_low:.2f} to {found.speedup_high:.2f})"
    return [
        share,
        speed,
        f"{found.psnr:.1f} dB ({found.psnr_low:.1f} to {found.psnr_high:.1f})",
        f"{found.psnr_worst:.1f}",
    ]
