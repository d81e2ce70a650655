"""`diffeff eval`: measure a folder of images or videos, or a model under a plan, and write a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from diffeff.cli.console import complain, emit, err, out, quiet_libraries, table
from diffeff.cli.flags import command, flagged_plan
from diffeff.cli.group import GATE_FAILED, alone
from diffeff.cli.progress import Stages
from diffeff.cli.request import parse_size, placement

if TYPE_CHECKING:
    from diffeff.eval.evaluate import Evaluation
    from diffeff.eval.settings import EvalSettings
    from diffeff.plan import Plan

__all__ = ["EvalRequest", "build", "evaluate"]

HELP = """Measure a folder of images or videos, or a model under a plan, and write a report.

A model with a plan is compared with itself without the plan, at the same prompts and seeds. A folder is compared with \
--reference. Results come with 95 % intervals, as JSON, Markdown, CSV and one HTML page.

A run that is stopped continues where it was: give the same command again. Nothing that was computed is computed twice.

\b
[bold]Examples[/]
diffeff eval sprites-wan --plan balanced
diffeff eval sprites-wan --feature-cache.interval 4 --limit 50 --metrics psnr,ssim,flicker,warping_error
diffeff eval out/ --reference real/ --metrics fid,kid,precision,recall --features inception:/models/inception.pt
diffeff eval out/ --prompts prompts.txt --metrics clip --features clip:/models/clip-vit-large-patch14
diffeff eval out/ --reference real/ --metrics fid --features clip:/models/clip --stats real.safetensors
diffeff eval sprites-wan --plan fast --fail-if "psnr<30" --fail-if "adherence<0.9"
diffeff eval ./my-model --plan plan.json --prompts general --engine ray --workers 4"""

_WHAT, _MODEL, _FILES, _RUN = "What is compared", "Generating", "Results and files", "Where it runs"


def _option(*names: str, panel: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@dataclass(frozen=True)
class EvalRequest:
    """The fields are the arguments and options of the command."""

    subject: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_MODEL",
            help="A folder of images or videos; or a model to generate with: a bundled one, a folder, a hub id.",
        ),
    ]
    reference: Annotated[
        str | None,
        _option(
            panel=_WHAT, metavar="DIR_OR_STATS",
            text="What to compare with: a folder, or statistics kept with --stats. For a model with a plan, left out, "
            "the model without it. Pairs are files of one name.",
        ),
    ] = None  # fmt: skip
    prompts: Annotated[
        str | None,
        _option(
            panel=_WHAT,
            text="A built-in list (sprites, sprites-stills, general) or a file: .txt, .csv, .jsonl, COCO .json.",
        ),
    ] = None
    metrics: Annotated[
        str | None,
        _option(
            panel=_WHAT, metavar="A,B,...",
            text="psnr, ssim, mae, latent_cosine, latent_l2, flicker, warping_error, motion, fid, kid, cmmd, "
            "precision, recall, fvd, clip, clip_consistency, lpips, adherence. Left out: fid, kid, clip, psnr, ssim, "
            "adherence, as far as they can be computed.",
        ),
    ] = None  # fmt: skip
    features: Annotated[
        str | None,
        _option(
            panel=_WHAT, metavar="A,B,...",
            text="sprites, inception:PATH, clip:DIR_OR_ID, module:PKG.MOD:FN. Each metric takes the first that "
            "serves it. Left out: sprites, for captions of the bundled world.",
        ),
    ] = None  # fmt: skip
    limit: Annotated[int | None, _option(min=1, panel=_WHAT, text="Only the first so many items or prompts.")] = None
    mixed_sizes: Annotated[
        bool,
        _option("--mixed-sizes", metavar="", panel=_WHAT, text="Allow items of different sizes in a folder."),
    ] = False
    frames_per_clip: Annotated[
        int, _option(min=1, panel=_WHAT, text="At most so many frames of a clip go into image features, evenly spread.")
    ] = 16
    plan: Annotated[
        str | None, _option(panel=_MODEL, text="A preset (lossless, high, balanced, fast) or a plan file.")
    ] = None
    steps: Annotated[int | None, _option(min=1, panel=_MODEL, text="Denoising steps.")] = None
    guidance: Annotated[float | None, _option(panel=_MODEL, text="Classifier-free guidance scale.")] = None
    size: Annotated[str | None, _option(metavar="WxH", panel=_MODEL, text="Width and height in pixels.")] = None
    frames: Annotated[int | None, _option(min=1, panel=_MODEL, text="Frames of a video.")] = None
    negative: Annotated[str | None, _option(panel=_MODEL, text="What to keep away from.")] = None
    seed: Annotated[int, _option(min=0, panel=_MODEL, text="Seed of the first prompt; the next take the next.")] = 0
    batch: Annotated[int, _option(min=1, panel=_MODEL, text="Prompts in one call of the model.")] = 1
    out: Annotated[
        Path, _option("-o", "--out", panel=_FILES, text="The report: .json; .md, .csv and .html come beside it.")
    ] = Path("report.json")
    html: Annotated[Path | None, _option(panel=_FILES, text="Where the HTML page goes, if not beside the report.")] = (
        None
    )
    no_html: Annotated[bool, _option("--no-html", metavar="", panel=_FILES, text="Write no HTML page.")] = False
    stats: Annotated[
        Path | None,
        _option(
            panel=_FILES, metavar="FILE.safetensors",
            text="Features of the reference set: kept in this file, and taken from it the next time.",
        ),
    ] = None  # fmt: skip
    fail_if: Annotated[
        list[str] | None,
        _option(
            panel=_FILES, metavar='"METRIC<NUMBER"',
            text="Leave with exit code 5 if this holds; also METRIC.low, .high (of the interval), .min, .max (of the "
            "items). May be given several times.",
        ),
    ] = None  # fmt: skip
    work: Annotated[
        Path | None,
        _option(panel=_FILES, text="Folder for all that is computed; diffeff-eval beside the report if left out."),
    ] = None
    json: Annotated[
        bool, _option("--json", metavar="", panel=_FILES, text="Print the report as JSON on stdout, nothing else.")
    ] = False
    engine: Annotated[
        Literal["local", "ray"], _option(panel=_RUN, text="ray spreads generation and features over workers.")
    ] = "local"
    workers: Annotated[int, _option(min=1, panel=_RUN, text="Workers of --engine ray.")] = 1
    threads: Annotated[
        int | None, _option(min=1, panel=_RUN, text="Torch threads of each worker; equal threads give equal bits.")
    ] = None
    gpus: Annotated[float, _option(min=0, panel=_RUN, text="GPUs (or a share of one) each worker of Ray reserves.")] = (
        1.0
    )
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], _option(panel=_RUN, text="auto takes cuda, then mps, then cpu.")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        _option(panel=_RUN, text="Of the model; auto is bfloat16 on cuda and float32 elsewhere."),
    ] = "auto"


def build() -> typer.Typer:
    """The command with the flags of all methods."""
    from diffeff.methods.table import config_classes

    return alone(command(EvalRequest, evaluate, config_classes()), HELP)


def evaluate(request: EvalRequest, flags: dict[str, Any]) -> None:
    """Run one request."""
    from diffeff.eval.evaluate import evaluate as run

    settings = _settings(request, _plan(request, flags))
    quiet_libraries()
    try:
        with Stages(quiet=request.json) as stages:
            result = run(settings, _Shown(stages))
    except KeyboardInterrupt:
        err().print(f"What is computed is kept in {escape(str(settings.folder))}: the same command continues there.")
        raise
    if request.json:
        emit({**result.report, "files": {kind: str(path) for kind, path in result.files.items()}})
    else:
        _show(result)
    for verdict in result.verdicts:
        if verdict.failed:
            complain("Gate failed", f"{verdict.gate.text}: {verdict.reason}")
    if result.failed:
        raise typer.Exit(GATE_FAILED)


class _Shown:
    """Progress of the evaluation as stages of the command line."""

    def __init__(self, stages: Stages) -> None:
        self._stages, self._at = stages, ("", 0)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        stage, before = self._at
        if stage != what:
            self._stages.begin(what, total)
            before = 0
        self._stages.advance(done - before)
        self._at = what, done


def _plan(request: EvalRequest, flags: Mapping[str, Any]) -> Plan | None:
    """The flags laid over --plan, or over the plan that lies in the model's folder; None without any."""
    from diffeff.loading import PLAN_FILE
    from diffeff.methods.table import config_classes
    from diffeff.plan import Plan

    own = Path(request.subject) / PLAN_FILE
    if request.plan is None and not flags and not own.is_file():
        return None
    base = Plan.of(request.plan) if request.plan is not None else Plan.load(own) if own.is_file() else Plan()
    return flagged_plan(base, flags, config_classes())


def _settings(request: EvalRequest, plan: Plan | None) -> EvalSettings:
    from diffeff.eval.settings import CallSettings, EvalSettings

    width, height = parse_size(request.size)
    device, dtype = placement(request.device, request.dtype)
    call = CallSettings(
        steps=request.steps,
        guidance=request.guidance,
        width=width,
        height=height,
        frames=request.frames,
        negative=request.negative,
    )
    return EvalSettings(
        **{name: getattr(request, name) for name in _SAME},
        plan=plan,
        call=call,
        metrics=_names(request.metrics),
        features=_names(request.features),
        fail_if=tuple(request.fail_if or ()),
        html=None if request.no_html else request.html or request.out.with_suffix(".html"),
        device=device,
        dtype=dtype,
    )


_SAME = (
    "subject", "reference", "prompts", "limit", "seed", "batch", "frames_per_clip", "mixed_sizes", "stats", "out",
    "work", "engine", "workers", "threads", "gpus",
)  # fmt: skip
"""Options that are settings of the same name."""


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _show(result: Evaluation) -> None:
    """The results in a table, then the notes and where the files are."""
    from diffeff.eval.render.evaluation import cells

    console = out()
    shown = table("metric", "value", "95 % interval", "n", "reference", "difference", "")
    for found in result.results:
        shown.add_row(*(escape(cell) for cell in cells(found.to_dict())))
    console.print(shown)
    notes = [f"{found.label}: {note}" for found in result.results for note in found.notes]
    for note in [*notes, *result.report["notes"]]:
        console.print(f"[dim]note: {escape(note)}[/]")
    for verdict in result.verdicts:
        if not verdict.failed:
            console.print(f"[green]gate passed:[/] {escape(verdict.gate.text)} ({escape(verdict.reason)})")
    for kind, path in result.files.items():
        console.print(f"{kind:>10}  [bold]{escape(str(path))}[/]")
