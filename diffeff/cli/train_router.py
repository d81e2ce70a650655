"""`diffeff train-router`: learn which module to compute at which step, and save it as a plan."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from diffeff.cli.console import emit, err, out, quiet_libraries, table
from diffeff.cli.flags import command
from diffeff.cli.group import alone
from diffeff.cli.request import DEFAULT_MODEL, DEVICES, DTYPES, placement
from diffeff.cli.searching import following, option, subject
from diffeff.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from diffeff.pipeline import DiffEffPipeline
    from diffeff.plan import Plan
    from diffeff.search.points import Measured
    from diffeff.search.router_training import TrainedRouter

__all__ = ["Request", "build", "train_router"]

HELP = """Learn, on a frozen model and without data, which attention and feed-forward module to compute at which step.

Every trajectory starts from noise: the model denoises while each module's output is mixed from a fresh and a kept \
one, and the mixing weights follow the error of the prediction, weighed by what an error at that step does to the \
final image, against the arithmetic that computing costs (HarmoniCa). What comes out is a table of steps and \
modules that meets the target, saved as a plan. It belongs to this model, scheduler and size. Stopped, the same \
command goes on where it was.

`--speedup` counts the denoiser's arithmetic. Wall time gains less where modules are small: the command measures \
both on noise that it never trained on (`--measure`). `diffeff tune` also tries fewer steps and whole skipped \
steps, which on small models is often better.

\b
[bold]Examples[/]
diffeff train-router sprites-wan -o plan.json
diffeff train-router sprites-wan --speedup 2 --minutes 8 -o plan.json
diffeff train-router ./my-model --compute 0.5 --prompts prompts.txt --steps 50 --batch 4 -o plan.json
diffeff generate "a red circle moving left, camera static" --plan plan.json --compare"""

_TARGET, _CALL, _TRAIN, _FILES = "Target", "Call of the model", "Training", "Result and files"


@dataclass(frozen=True)
class Request:
    """The fields are the arguments and options of the command."""

    model: Annotated[str, typer.Argument(help="A bundled model (diffeff models), a folder, or a hub id.")] = (
        DEFAULT_MODEL
    )
    output: Annotated[Path, option("Plan file to write.", _FILES, "-o", "--output")] = Path("router.json")
    speedup: Annotated[
        float | None, option("Times less arithmetic in the denoiser; 1.5 if there is no target.", _TARGET)
    ] = None
    compute: Annotated[
        float | None, option("Or the share of the modules' arithmetic that is left, such as 0.5.", _TARGET)
    ] = None
    prompts: Annotated[str | None, option("A file, or a built-in set: sprites, general.", _CALL)] = None
    limit: Annotated[int, option("Prompts to train on, in turns.", _CALL, min=1)] = 16
    steps: Annotated[int | None, option("Steps of the run; the model's own if left out.", _CALL, min=1)] = None
    guidance: Annotated[float | None, option("Classifier-free guidance scale.", _CALL)] = None
    size: Annotated[str | None, option("Width and height in pixels.", _CALL, metavar="WxH")] = None
    frames: Annotated[int | None, option("Frames of a video.", _CALL, min=1)] = None
    seed: Annotated[int, option("Equal seeds give equal routers.", _TRAIN, min=0)] = 0
    trajectories: Annotated[int, option("Runs to train on; each costs 3 to 4 plain ones.", _TRAIN, min=1)] = 40
    minutes: Annotated[float | None, option("Stop training after so long; it can go on later.", _TRAIN)] = None
    batch: Annotated[int, option("Prompts per trajectory.", _TRAIN, min=1)] = 1
    objective: Annotated[
        Literal["normalised", "published"], option("How steps are weighed: docs/router.md.", _TRAIN)
    ] = "normalised"
    measure: Annotated[
        int, option("Prompts to measure the plan on afterwards, beside the plain run.", _TRAIN, min=0)
    ] = 4
    device: Annotated[DEVICES, option("auto takes cuda, then mps, then cpu.", _TRAIN)] = "auto"
    dtype: Annotated[DTYPES, option("auto is bfloat16 on cuda and float32 elsewhere.", _TRAIN)] = "auto"
    work: Annotated[Path | None, option("File in which the state is kept, to go on after a stop.", _FILES)] = None
    json: Annotated[bool, option("Print the result as JSON on stdout.", _FILES, "--json", metavar="")] = False


def build() -> typer.Typer:
    """The command."""
    return alone(command(Request, train_router, {}), HELP)


def train_router(request: Request, given: dict[str, Any]) -> None:
    """The command's work."""
    if request.speedup is not None and request.compute is not None:
        raise ConfigError("--speedup and --compute exclude each other; give one")
    if request.output.is_dir():
        raise OutputError(f"cannot write {request.output}: it is a folder")
    quiet_libraries()
    pipe = _load(request)
    prompts, call = subject(request, pipe)
    with following(request.json) as observe:
        trained = _trained(request, pipe, prompts, call, observe)
        plan = _plan(pipe, trained, call)
        found = _measured(request, pipe, plan, prompts, call, observe)
    written = plan.save(request.output)
    _finish(request, trained, found, str(written))


def _load(request: Request) -> DiffEffPipeline:
    from diffeff.pipeline import DiffEffPipeline

    device, dtype = placement(request.device, request.dtype)
    import torch

    pipe = DiffEffPipeline.from_pretrained(request.model, dtype=getattr(torch, dtype))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _trained(
    request: Request,
    pipe: DiffEffPipeline,
    prompts: Sequence[Any],
    call: dict[str, Any],
    observe: Callable[[float, str], None],
) -> TrainedRouter:
    from diffeff.search.router import train

    same = ("speedup", "compute", "seed", "batch", "trajectories", "minutes", "objective")
    work = request.work or _work(request)
    options = {name: getattr(request, name) for name in same}
    try:
        return train(pipe, prompts, call=call, work=work, observe=observe, **options)
    except KeyboardInterrupt:
        err().print(f"What is learned is kept in {work}; the same command goes on from there.", markup=False)
        raise


def _work(request: Request) -> Path:
    """A file of its own for each thing that can be trained."""
    told = repr([v for k, v in sorted(vars(request).items()) if k not in ("output", "minutes", "measure", "json")])
    name = hashlib.sha256(told.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"diffeff-router-{name}.safetensors"


def _plan(pipe: DiffEffPipeline, trained: TrainedRouter, call: dict[str, Any]) -> Plan:
    """The router as a plan that says what it was made on."""
    from dataclasses import replace

    from diffeff.plan import Plan
    from diffeff.stamp import stamp_of

    stamp = stamp_of(pipe.wrapped, pipe.denoisers)
    return Plan([trained.config], replace(stamp, steps=int(call["num_inference_steps"])))


def _measured(
    request: Request,
    pipe: DiffEffPipeline,
    plan: Plan,
    prompts: Sequence[Any],
    call: dict[str, Any],
    observe: Callable[[float, str], None],
) -> Measured | None:
    """The plan beside the plain run, in turns, on noise that was not trained on."""
    from diffeff.search.bench import Bench
    from diffeff.search.points import Candidate, Point

    if not request.measure:
        return None
    chosen = list(islice((prompts[n % len(prompts)] for n in count()), request.measure))
    argument = "prompt" if isinstance(chosen[0], str) else "class_labels"
    bench = Bench(pipe, chosen, range(len(chosen)), call, argument)
    candidate = Candidate("schedule", "router", plan, bench.steps)
    (point,) = bench.measure([Point(candidate, 0.0, 0.0, 0.0)], observe=lambda done: observe(1.0, "measure the plan"))
    return point.measured


# --- output ----------------------------------------------------------------------------------------------------------
def _finish(request: Request, trained: TrainedRouter, found: Measured | None, written: str) -> None:
    if request.json:
        told = {k: v for k, v in vars(trained).items() if k != "config"}
        emit(told | {"measured": found and vars(found), "model": request.model, "plan": written})
        return
    console = out()
    shown = table("modules", "computed")
    for kind, share in trained.kinds.items():
        shown.add_row(kind.replace("_", "-"), f"{100 * share:.0f} % of calls")
    shown.add_row("arithmetic", f"{100 * trained.share:.1f} % of the modules', {trained.speedup:.2f}x less in all")
    console.print(shown)
    if not trained.finished:
        console.print(f"Stopped after {trained.trajectories} trajectories; the same command goes on from there.")
    if found is not None:
        console.print(
            f"Measured on {found.runs} prompts at fresh noise: {found.psnr:.1f} dB to the plain run (worst "
            f"{found.psnr_worst:.1f}), {found.speedup:.2f}x as fast ({found.speedup_low:.2f} to "
            f"{found.speedup_high:.2f})."
        )
    console.print(f"plan  [bold]{escape(written)}[/]")
