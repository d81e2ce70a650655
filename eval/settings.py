"""What an evaluation is asked for, and what follows from it before anything is loaded or computed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from diffeff.errors import ConfigError, ModelLoadError, OutputError
from diffeff.files import replacing
from diffeff.plan import Plan
from diffeff.zoo import bundled

__all__ = ["PLAIN", "CallSettings", "EvalSettings", "is_model"]

PLAIN = "plain"
"""The reference that is generated: the same model without a plan, at the same prompts and seeds."""

_MODEL_FILES = ("model_index.json", "diffeff_plan.json")
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """Arguments of the pipeline's call; what is None is left to the model's card, or to the pipeline."""

    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    negative: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """One evaluation.

    `subject` is a folder of images or videos, or a model (a bundled name, a folder, a hub id) to generate with, under
    `plan` when there is one. `reference` is a folder, a statistics file, or `plain`; None takes `plain` for a model
    with a plan and nothing otherwise. `prompts` is a built-in list or a file. `metrics` of None are the usual ones
    that can be computed from the rest. `features` lists sources: each metric takes the first that can serve it; None
    takes `sprites` for what shows the bundled world, and nothing otherwise. `stats` is a file of reference statistics:
    reused when it is there, written otherwise. `threads` fixes torch's threads: runs of different engines give the
    same bits when it is the same. `gpus` is what each worker of Ray reserves when `device` is a CUDA one.
    """

    subject: str
    plan: Plan | None = None
    reference: str | None = None
    prompts: str | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 1
    call: CallSettings = CallSettings()
    metrics: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    frames_per_clip: int = 16
    mixed_sizes: bool = False
    stats: Path | None = None
    fail_if: tuple[str, ...] = ()
    out: Path = Path("report.json")
    html: Path | None = None
    work: Path | None = None
    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    threads: int | None = None
    gpus: float = 1.0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("limit", "batch", "frames_per_clip", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; allowed: 0 or more")
        if self.features == ():
            raise ConfigError("features are empty: name at least one source, such as sprites, or leave them out")

    @property
    def folder(self) -> Path:
        """Where what is computed is kept: `work`, or `diffeff-eval` beside the report."""
        return self.work or self.out.parent / "diffeff-eval"

    @property
    def generates(self) -> bool:
        """Whether the subject is a model."""
        return is_model(self.subject)

    @property
    def prompt_source(self) -> str | None:
        """The prompts asked for, or for a model the built-in list that suits it."""
        if self.prompts is not None or not self.generates:
            return self.prompts
        if self.subject == "digits-dit":
            raise ConfigError("digits-dit takes classes, not prompts: give --prompts FILE with one digit a line")
        if self.subject == "sprites-sd":
            return "sprites-stills"
        return "sprites" if self.subject in bundled.NAMES else "general"

    @property
    def compares(self) -> str | None:
        """The reference asked for, or `plain` for a model with a plan."""
        if self.reference is not None or self.plan is None or not self.generates:
            return self.reference
        return PLAIN

    def check(self) -> None:
        """Raise what is wrong with the combination, and OutputError where the report could not be written."""
        if not self.generates:
            self._check_folder()
        elif self.reference == PLAIN and self.plan is None:
            raise ConfigError("the reference `plain` is the model without its plan: give --plan, or leave it out")
        for place in (self.out, self.html, self.stats):
            _check_place(place)
        if self.out.suffix.lower() != ".json":
            raise OutputError(
                f"cannot write {self.out}: the report is JSON. Name it .json; .md and .csv come beside it."
            )

    def _check_folder(self) -> None:
        given = [name for name, value in vars(self.call).items() if value is not None]
        given += ["plan"] if self.plan is not None else []
        if given:
            raise ConfigError(
                f"{self.subject} is a folder of finished items, so {', '.join(given)} cannot apply. Leave it out, or "
                "name a model."
            )
        if self.reference == PLAIN:
            raise ConfigError("the reference `plain` is generated: it needs a model with a plan, not a folder")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the plan stands as its JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in data.items()}


def is_model(subject: str) -> bool:
    """Whether `subject` names a model rather than a folder of images or videos.

    A bundled name is a model; write `./sprites-wan` for a folder of that name. Raises ModelLoadError for what is
    neither.
    """
    if subject in bundled.NAMES:
        return True
    path = Path(subject)
    if path.is_dir():
        return any((path / name).is_file() for name in _MODEL_FILES)
    if path.exists():
        raise ModelLoadError(f"{subject} is a file; give a folder of images or videos, or a model")
    if _HUB_ID.match(subject):
        return True
    raise ModelLoadError(
        f"there is no {subject!r}: it is neither a folder of images or videos, a bundled model "
        f"({', '.join(bundled.NAMES)}), nor a hub id (owner/name)"
    )


def _check_place(place: Path | None) -> None:
    """The only honest test of a place is to write into it; nothing stays there."""
    if place is None:
        return
    if place.is_dir():
        raise OutputError(f"cannot write {place}: a folder of that name is there. Choose another name.")
    probe = place.with_name(f".{place.name}.probe")
    with replacing(probe):
        pass
    probe.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return value.to_dict()
    if isinstance(value, CallSettings):
        return {name: item for name, item in vars(value).items() if item is not None}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping | str) or not isinstance(value, Sequence):
        return value
    return [_plain(item) for item in value]
