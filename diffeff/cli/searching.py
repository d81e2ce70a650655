"""What the commands that search share: options, prompts and call of the model, a bar of the work's progress."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffeff.cli.console import err
from diffeff.cli.request import Request as Generate
from diffeff.cli.request import call_options, is_clip, recommended

if TYPE_CHECKING:
    from diffeff.pipeline import DiffEffPipeline

__all__ = ["Subject", "following", "option", "subject"]


def option(help_: str, panel: str, *names: str, **more: Any) -> Any:
    """A command-line option with its help, under the heading `panel`."""
    return typer.Option(*names, help=help_, rich_help_panel=panel, **more)


class Subject(Protocol):
    """A request that says what a search is about."""

    @property
    def model(self) -> str: ...
    @property
    def prompts(self) -> str | None: ...
    @property
    def limit(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def size(self) -> str | None: ...
    @property
    def frames(self) -> int | None: ...


def subject(request: Subject, pipe: DiffEffPipeline) -> tuple[list[Any], dict[str, Any]]:
    """Prompts (or classes) and the other arguments of the pipeline's call."""
    same = ("model", "steps", "guidance", "size", "frames")
    classes = "class_labels" in inspect.signature(type(pipe.wrapped).__call__).parameters
    asked = Generate(
        prompt=None if classes else "", label="0" if classes else None, **{n: getattr(request, n) for n in same}
    )
    call = call_options(asked, pipe, recommended(request.model))
    for name in ("prompt", "class_labels", "output_type"):
        call.pop(name, None)
    if classes:
        return list(range(request.limit)), call
    return _prompts(request, is_clip(pipe)), call


def _prompts(request: Subject, clip: bool) -> list[str]:
    from diffeff.eval.prompts import load_prompts
    from diffeff.zoo import bundled

    own = ("sprites" if clip else "sprites-stills") if request.model in bundled.NAMES else "general"
    return load_prompts(request.prompts or own, request.limit).texts


@contextmanager
def following(quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar with the time left on a terminal; one line per stage in a log file."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn(), TimeRemainingColumn())
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task, said = bar.add_task("load the model", total=1.0), [""]

        def observe(done: float, what: str) -> None:
            bar.update(task, description=escape(what), completed=done)
            if hidden and not quiet and what != said[0]:
                said[0] = what
                console.print(f"{100 * done:3.0f} %  {what}", markup=False)

        yield observe
