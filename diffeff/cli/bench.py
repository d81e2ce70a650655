"""`diffeff bench`: plans beside other tools and beside fewer steps, in one run; the matrix, scaling, and the report."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from typer.core import TyperGroup

from diffeff.cli.bench_output import bench_table, finish, kept, kernels_table, matrix_table, progress, scaling_table
from diffeff.cli.console import err, out
from diffeff.cli.flags import command
from diffeff.cli.group import EPILOG
from diffeff.cli.request import DEVICES, DTYPES, parse_size, placement
from diffeff.errors import ConfigError

if TYPE_CHECKING:
    from diffeff.eval.bench.run import BenchSettings

__all__ = ["build"]

_HELP = """Measure plans beside other acceleration tools and beside fewer steps: speed, fidelity, adherence, memory.

All arms make the same clips from the same seeds and take turns, prompt by prompt. `diffeff bench MODEL` is short for \
`diffeff bench run MODEL`. Stopped, the same command goes on where it was.

\b
[bold]Examples[/]
diffeff bench sprites-wan
diffeff bench sprites-wan --plans high,balanced,my.json --against diffusers:fbcache,cache-dit:dbcache,fewer-steps
diffeff bench sprites-wan --plans balanced --against all --sweep --limit 50
diffeff bench sprites-wan --plans feature_cache@interval=3 --against diffusers:fbcache@threshold=0.2
diffeff bench report bench.jsonl -o bench.html"""

_RUN = """Measure plans, other tools and fewer steps on one model; one JSON line per arm.

\b
A plan is a preset, a file, or a method with options: balanced, my.json, feature_cache@interval=3.
Against: fewer-steps, fewer-steps:SOLVER (dpm++, unipc, unipc3, heun, euler), fewer-steps:solvers, all, or
%s.

\b
[bold]Examples[/]
diffeff bench sprites-wan --plans balanced --against diffusers:fbcache,fewer-steps@steps=12
diffeff bench sprites-sd --against deepcache,tomesd,fewer-steps:dpm++ --sweep"""

_MATRIX = """Try every method on every family of models at tiny size: works, refused with its reason, idle, or fails.

\b
[bold]Examples[/]
diffeff bench matrix
diffeff bench matrix --families wan,flux --out matrix.jsonl"""

_SCALING = """Measure how time and memory of a model grow with tokens, frames, steps and batch, with log-log slopes.

\b
[bold]Examples[/]
diffeff bench scaling sprites-wan
diffeff bench scaling sprites-wan --axes frames,steps --plan balanced --out scaling.jsonl"""

_KERNELS = """Time every kernel beside torch's own ways to compute the same, against the device's measured ceilings.

\b
[bold]Examples[/]
diffeff bench kernels
diffeff bench kernels --kernels temporal_attention,sliced_attention --device cuda --dtype float16 -o kernels.jsonl"""

_REPORT = """Make one self-contained HTML page from the rows of benches: tables, plots and the clips side by side.

\b
[bold]Examples[/]
diffeff bench report bench.jsonl -o bench.html
diffeff bench report bench.jsonl matrix.jsonl scaling.jsonl -o bench.html"""

_DEFAULT_PLANS, _DEFAULT_AGAINST = "high,balanced,fast", "fewer-steps"
_WHAT, _CALL, _HOW = "What is compared", "Call of the model", "How it is measured"


class _Group(TyperGroup):
    """`bench MODEL ...` means `bench run MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


def build() -> typer.Typer:
    """The command group."""
    from diffeff.eval.bench.peers import PEERS

    app = typer.Typer(
        cls=_Group,
        help=_HELP,
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback()(_nothing)
    app.command("run", help=_RUN % _folded(PEERS), epilog=EPILOG)(command(Request, run, {}))
    app.command("matrix", help=_MATRIX, epilog=EPILOG)(matrix)
    app.command("scaling", help=_SCALING, epilog=EPILOG)(scaling)
    app.command("kernels", help=_KERNELS, epilog=EPILOG)(kernels)
    app.command("report", help=_REPORT, epilog=EPILOG)(report)
    return app


def _nothing() -> None:
    """A callback makes typer keep the group, however many commands it has."""


def _folded(names: Iterable[str]) -> str:
    return "\n".join(textwrap.wrap(", ".join(names), 78, break_on_hyphens=False))


@dataclass(frozen=True)
class Request:
    """The arguments and options of `bench run`."""

    model: Annotated[str, typer.Argument(help="A bundled model, a folder, or a hub id.", show_default=False)]
    plans: Annotated[
        str | None,
        typer.Option(
            help=f"Plans, comma-separated. Without --plans and --against: {_DEFAULT_PLANS}.", rich_help_panel=_WHAT
        ),
    ] = None
    against: Annotated[
        str | None, typer.Option(help="Other tools and fewer steps, comma-separated.", rich_help_panel=_WHAT)
    ] = None
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", metavar="", help="Each at several settings: a curve instead of a point.", rich_help_panel=_WHAT
        ),
    ] = False
    prompts: Annotated[
        str | None,
        typer.Option(
            help="sprites, sprites-stills, general, classes, or a file; what suits the model if left out.",
            rich_help_panel=_WHAT,
        ),
    ] = None
    limit: Annotated[int, typer.Option(min=1, help="The first so many prompts.", rich_help_panel=_WHAT)] = 20
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first prompt; the next take the next.", rich_help_panel=_WHAT)
    ] = 0
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps; the model's own number if left out.", rich_help_panel=_CALL),
    ] = None
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.", rich_help_panel=_CALL)] = (
        None
    )
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Width and height in pixels.", rich_help_panel=_CALL)
    ] = None
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.", rich_help_panel=_CALL)] = None
    device: Annotated[DEVICES, typer.Option(help="auto takes cuda, then mps, then cpu.", rich_help_panel=_HOW)] = "auto"
    dtype: Annotated[
        DTYPES, typer.Option(help="auto is bfloat16 on cuda and float32 elsewhere.", rich_help_panel=_HOW)
    ] = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.", rich_help_panel=_HOW)] = (
        None
    )
    memory: Annotated[
        bool, typer.Option(help="Peak memory of each arm, by one run more in a fresh process.", rich_help_panel=_HOW)
    ] = True
    patience: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which a run counts as failed.", rich_help_panel=_HOW),
    ] = 3600.0
    file: Annotated[Path, typer.Option("-o", "--out", help="JSON-lines file that gets the rows.")] = Path("bench.jsonl")
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print the rows as JSON on stdout.")] = False


def run(request: Request, flags: dict[str, Any]) -> None:
    """The command's work."""
    rows = _measured(_settings(request), quiet=request.json)
    finish(rows, request.file, request.json, bench_table)


def _settings(request: Request) -> BenchSettings:
    from diffeff.eval.bench.run import BenchSettings
    from diffeff.eval.settings import CallSettings

    plans, against = request.plans, request.against
    if plans is None and against is None:
        plans, against = _DEFAULT_PLANS, _DEFAULT_AGAINST
    device, dtype = placement(request.device, request.dtype)
    width, height = parse_size(request.size)
    same = ("model", "sweep", "prompts", "limit", "seed", "threads", "memory", "patience")
    return BenchSettings(
        **{name: getattr(request, name) for name in same},
        plans=_list(plans),
        against=_list(against),
        call=CallSettings(
            steps=request.steps, guidance=request.guidance, width=width, height=height, frames=request.frames
        ),
        device=device,
        dtype=dtype,
        out=request.file,
    )


def _measured(settings: BenchSettings, quiet: bool) -> list[dict[str, Any]]:
    from diffeff.eval.bench.run import run_bench, work_folder

    with progress(quiet) as observe:
        try:
            return run_bench(settings, observe)
        except KeyboardInterrupt:
            err().print(
                f"What is finished is kept in {work_folder(settings)}; the same command goes on from there.",
                markup=False,
            )
            raise


def matrix(
    families: Annotated[str | None, typer.Option(help="Families, comma-separated; all if left out.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated; all if left out.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", metavar="", help="Every pair of methods, too.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    file: Annotated[Path | None, typer.Option("-o", "--out", help="JSON-lines file that gets the rows.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """The command's work."""
    from diffeff.eval.bench.matrix import MatrixSettings, measure_matrix

    _check(file)
    settings = MatrixSettings(families=_list(families), methods=_list(methods), pairs=pairs, steps=steps, seed=seed)
    with progress(json) as observe:
        rows = kept(measure_matrix(settings, observe), file)
    finish(rows, file, json, matrix_table)


def scaling(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder, or a hub id.")] = "sprites-wan",
    axes: Annotated[
        str | None, typer.Option(help="tokens, frames, steps, batch, comma-separated; all it has if left out.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="A preset or a plan file to measure with.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per point.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    points: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=A,B,C", help="Points of an axis, as in frames=5,9,17 or tokens=32x32,48x48,64x64."),
    ] = None,
    memory: Annotated[
        Literal["fresh", "here", "off"],
        typer.Option(help="Peak memory per point: in a fresh process, in this, or not."),
    ] = "fresh",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; the model's own number if left out.")
    ] = None,
    device: Annotated[DEVICES, typer.Option(help="auto takes cuda, then mps, then cpu.")] = "auto",
    dtype: Annotated[DTYPES, typer.Option(help="auto is bfloat16 on cuda and float32 elsewhere.")] = "auto",
    file: Annotated[Path | None, typer.Option("-o", "--out", help="JSON-lines file that gets the rows.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """The command's work."""
    from diffeff.eval.bench.scaling import ScalingSettings, measure_scaling
    from diffeff.plan import Plan

    _check(file)
    place, precision = placement(device, dtype)
    settings = ScalingSettings(
        model=model,
        axes=_list(axes),
        points=dict(_points(text) for text in points or ()),
        plan=None if plan is None else Plan.of(plan),
        repeats=repeats,
        seed=seed,
        memory=memory,
        device=place,
        dtype=precision,
        call={} if steps is None else {"num_inference_steps": steps},
    )
    with progress(json) as observe:
        rows = kept(measure_scaling(settings, observe), file)
    finish(rows, file, json, scaling_table)


def kernels(
    names: Annotated[str | None, typer.Option("--kernels", help="Kernels, comma-separated; all if left out.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each way takes.")] = 15,
    size: Annotated[
        Literal["auto", "full", "small"], typer.Option(help="auto is that of real models on cuda and small elsewhere.")
    ] = "auto",
    device: Annotated[DEVICES, typer.Option(help="auto takes cuda, then mps, then cpu.")] = "auto",
    dtype: Annotated[DTYPES, typer.Option(help="auto is bfloat16 on cuda and float32 elsewhere.")] = "auto",
    file: Annotated[Path | None, typer.Option("-o", "--out", help="JSON-lines file that gets the rows.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """The command's work."""
    from diffeff.eval.bench.kernels import KernelSettings, measure_kernels

    _check(file)
    place, precision = placement(device, dtype)
    settings = KernelSettings(
        kernels=_list(names),
        rounds=rounds,
        device=place,
        dtype=str(precision).removeprefix("torch."),
        full=None if size == "auto" else size == "full",
    )
    with progress(json) as observe:
        rows = kept(measure_kernels(settings, observe), file)
    finish(rows, file, json, kernels_table)


def report(
    files: Annotated[list[Path], typer.Argument(help="JSON-lines files of benches.")],
    page: Annotated[Path, typer.Option("-o", "--out", help="The page.")] = Path("bench.html"),
) -> None:
    """The command's work."""
    from diffeff.eval.render.page import bench_page
    from diffeff.eval.render.records import read_rows
    from diffeff.files import write_text

    rows = [row for file in files for row in read_rows(file)]
    if not rows:
        raise ConfigError(f"{', '.join(map(str, files))}: no rows; diffeff bench MODEL writes some")
    write_text(page, bench_page(rows))
    out().print(f"{len(rows)} rows  [bold]{escape(str(page))}[/]")


def _check(file: Path | None) -> None:
    """What cannot be written is said before any work."""
    from diffeff.eval.bench.rows import check_appendable

    if file is not None:
        check_appendable(file)


# --- input ----------------------------------------------------------------------------------------------------------
def _list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _points(text: str) -> tuple[str, tuple[Any, ...]]:
    """`frames=5,9,17` as the axis and its points; a size is (height, width)."""
    axis, _, values = text.partition("=")
    try:
        return axis, tuple(parse_size(v)[::-1] if "x" in v else int(v) for v in _list(values))
    except ValueError as error:
        raise ConfigError(f"--points {text}: expected AXIS=A,B,C, as in frames=5,9,17 or tokens=32x32,48x48") from error
