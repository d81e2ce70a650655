"""`diffeff generate`: make a clip or a picture, with a plan or without, and show what the plan did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from diffeff.cli.console import emit, out, quiet_libraries
from diffeff.cli.flags import command, flagged_plan
from diffeff.cli.group import alone
from diffeff.cli.outputs import Files, summary, words
from diffeff.cli.progress import Stages
from diffeff.cli.request import Request, call, call_options, is_clip, placement, recommended, scene_of
from diffeff.errors import OutputError, UnsupportedModel
from diffeff.media import check_target, enlarge, to_bytes, write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffeff.pipeline import DiffEffPipeline
    from diffeff.plan import Plan

__all__ = ["build", "generate"]

HELP = """Make a clip or a picture from a prompt.

Every method has flags of its own, listed below: --METHOD switches it on, --no-METHOD takes it out of the plan, \
--METHOD.OPTION VALUE sets one option. They are laid over --plan, or over an empty plan.

\b
[bold]Examples[/]
diffeff generate "a red circle moving left, camera pans right"
diffeff generate "a blue cross moving up, camera static" -o cross.gif --enlarge 4
diffeff generate "a green circle moving right, camera zooms in" -o out.mp4 --compare
diffeff generate "a cat" -m stable-diffusion-v1-5/stable-diffusion-v1-5 -o cat.png --plan fast
diffeff generate --class 7 -m digits-dit -o seven.png --feature-cache.interval 3"""


def build() -> typer.Typer:
    """The command with the flags of all methods."""
    from diffeff.methods.table import config_classes

    return alone(command(Request, generate, config_classes()), HELP)


@dataclass(frozen=True)
class _Job:
    """A request with everything it needs: the loaded pipeline, the plan, the call, where to write."""

    request: Request
    pipe: DiffEffPipeline
    plan: Plan
    options: dict[str, Any]
    output: Path
    stages: Stages

    @property
    def steps(self) -> int:
        return int(self.options["num_inference_steps"])

    @property
    def settings(self) -> dict[str, Any]:
        """What is run, in words a program can read."""
        call_ = {k: v for k, v in self.options.items() if k != "output_type"}
        return {
            "model": self.request.model,
            "seed": self.request.seed,
            "call": call_,
            "plan": self.plan.to_dict(),
        }

    def run(self, pipe: DiffEffPipeline, steps: int, name: str = "") -> NDArray[np.float32]:
        label = "plain, fewer steps" if name == "fewer" else name
        with self.stages.watching(pipe.wrapped, label):
            return call(pipe, self.options, steps, self.request.seed)


def generate(request: Request, flags: dict[str, Any]) -> None:
    """Run one request."""
    _plan(request, flags)  # what is wrong with the plan or the target is said before a model is loaded
    if request.output is not None:
        check_target(request.output)
    with Stages(quiet=request.json) as stages:
        job = _prepare(request, flags, stages)
        record, lines = _compare(job) if request.compare else _single(job)
    if request.json:
        emit(record)
        return
    console = out()
    for line in lines:
        console.print(line)


def _plan(request: Request, flags: dict[str, Any], own: Plan | None = None) -> Plan:
    """The flags laid over --plan, or else over the plan the model brought (`own`)."""
    from diffeff.methods.table import config_classes
    from diffeff.plan import Plan

    base = Plan.of(request.plan) if request.plan is not None else own or Plan()
    if request.compare and request.plan is None and not flags and not base.methods:
        base = Plan.preset("balanced")
    return flagged_plan(base, flags, config_classes())


def _prepare(request: Request, flags: dict[str, Any], stages: Stages) -> _Job:
    stages.begin("load " + request.model)
    quiet_libraries()
    import torch

    from diffeff.pipeline import DiffEffPipeline

    device, dtype = placement(request.device, request.dtype)
    pipe = DiffEffPipeline.from_pretrained(request.model, dtype=getattr(torch, dtype)).to(device)
    output = request.output or Path("out.mp4" if is_clip(pipe) else "out.png")
    if not is_clip(pipe) and output.suffix.lower() != ".png":
        raise OutputError(f"cannot write {output}: {request.model} makes still pictures. Name a .png.")
    check_target(output)
    options = call_options(request, pipe, recommended(request.model))
    return _Job(request, pipe, _plan(request, flags, pipe.plan), options, output, stages)


def _single(job: _Job) -> tuple[dict[str, Any], list[str]]:
    """One run: the record for programs and the lines for people."""
    from diffeff.eval.compare import adherence_of

    try:
        job.pipe.apply(job.plan)
    except UnsupportedModel:
        if job.plan.methods:
            raise
        job.pipe.remove()  # plain generation needs no description of the model
    frames = job.run(job.pipe, job.steps)
    clip = enlarge(to_bytes(frames), job.request.enlarge)
    write(job.output, clip, job.request.fps)
    seen, report = adherence_of(scene_of(job.request), frames), job.pipe.report
    count, height, width, _ = clip.shape
    lines = [escape(str(report))] if report is not None else []
    lines += [f"adherence: {words(seen)}"]
    lines += [f"[bold]{escape(str(job.output))}[/]  {width}x{height}" + (f", {count} frames" if count > 1 else "")]
    files = {"output": str(job.output)}
    return job.settings | {
        "report": report.to_dict() if report else None,
        "adherence": seen,
        "files": files,
    }, lines


def _compare(job: _Job) -> tuple[dict[str, Any], list[str]]:
    """Plain and accelerated: the record for programs and the lines for people."""
    from diffeff.eval.compare import compare

    request, scene = job.request, scene_of(job.request)
    with Files(job.output, request.fps, request.enlarge) as files:
        result = compare(job.pipe, job.plan, job.run, job.steps, rounds=request.rounds, scene=scene, observe=files.arm)
        subject = job.options.get("prompt", f"class {request.label or request.prompt}")
        files.comparison(result, f"{subject} ({request.model}, seed {request.seed})", job.settings)
    return job.settings | {"comparison": result.to_dict(), "files": files.written}, summary(result, files.written)
