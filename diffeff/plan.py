"""Plan: an ordered list of method configs that can be read, checked, saved and shared before anything is applied."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config
from diffeff.core.method import Claim, Method
from diffeff.errors import MethodInapplicable, PlanConflict, PlanFormatError, UnknownName, nearest
from diffeff.methods.table import config_class
from diffeff.presets import PRESETS

__all__ = ["Artefact", "ModelStamp", "Plan", "PlanCheck", "check_methods"]

VERSION = 1
_KEYS = ("diffeff_plan", "model", "methods", "artefacts")


@dataclass(frozen=True)
class ModelStamp:
    """What a plan was made on. A different model is a warning when the plan is applied, not an error."""

    family: str
    fingerprint: str
    scheduler: str | None = None
    steps: int | None = None
    size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Artefact:
    """A file a plan refers to: relative path and sha256 of its bytes. Safetensors or JSON, never pickle."""

    path: str
    sha256: str


@dataclass(frozen=True)
class PlanCheck:
    """The verdict on one method of a plan for one model."""

    method: str
    applies: bool
    reason: str


@dataclass(frozen=True, init=False)
class Plan:
    """Methods to apply together, in any order: each method's layer fixes where it acts.

    `Plan([FeatureCache(), KVDownsample()])`, `Plan.preset("balanced")`, `Plan.load("plan.json")`.
    """

    methods: tuple[Config, ...]
    model: ModelStamp | None = None
    artefacts: Mapping[str, Artefact] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)
    """Where artefact paths are relative to."""

    def __init__(
        self,
        methods: Iterable[Config] = (),
        model: ModelStamp | None = None,
        artefacts: Mapping[str, Artefact] | None = None,
        folder: Path | None = None,
    ) -> None:
        chosen = tuple(methods)
        for config in chosen:
            if not isinstance(config, Config):
                raise PlanFormatError(f"a plan holds method configs such as FeatureCache(...), not {config!r}")
        given = {"methods": chosen, "model": model, "artefacts": artefacts or {}, "folder": folder}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @classmethod
    def preset(cls, name: str) -> Plan:
        """A ready plan: lossless, high, balanced or fast (`diffeff plan show NAME` says what it holds)."""
        if name not in PRESETS:
            raise UnknownName(f"there is no preset {name!r}. {nearest(name, PRESETS)}")
        return cls.from_dict({"diffeff_plan": VERSION, "methods": list(PRESETS[name].methods)})

    @classmethod
    def of(cls, what: Plan | Config | str | os.PathLike[str] | Mapping[str, Any] | Iterable[Config]) -> Plan:
        """A plan from whatever a user gives: a plan, configs, a preset's name, a file's path or a JSON object."""
        if isinstance(what, Plan):
            return what
        if isinstance(what, Config):
            return cls([what])
        if isinstance(what, Mapping):
            return cls.from_dict(what)
        if isinstance(what, str | os.PathLike):
            text = os.fspath(what)
            if text in PRESETS:
                return cls.preset(text)
            if text.endswith(".json") or os.sep in text or Path(text).exists():
                return cls.load(text)
            raise UnknownName(f"{text!r} is neither a preset nor a plan file. {nearest(text, PRESETS)}")
        return cls(what)

    # --- JSON ---------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """The plan file's JSON object."""
        out: dict[str, Any] = {"diffeff_plan": VERSION}
        if self.model is not None:
            stamp = {k: v for k, v in vars(self.model).items() if v is not None}
            out["model"] = stamp | ({"size": list(self.model.size)} if self.model.size else {})
        out["methods"] = [config.to_dict() for config in self.methods]
        if self.artefacts:
            out["artefacts"] = {k: {"path": a.path, "sha256": a.sha256} for k, a in self.artefacts.items()}
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path | None = None) -> Plan:
        """Read a plan's JSON object. Raises PlanFormatError (with the nearest known key) for anything unknown."""
        _check_format(data)
        methods = []
        for number, entry in enumerate(data.get("methods", [])):
            if not isinstance(entry, Mapping) or "use" not in entry:
                raise PlanFormatError(f'method {number} of the plan is {entry!r}; expected {{"use": NAME, ...}}')
            methods.append(config_class(str(entry["use"])).from_dict(entry))
        return cls(methods, _stamp(data.get("model")), _artefacts(data.get("artefacts") or {}), folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file. Raises PlanFormatError naming the file and what is wrong with it."""
        file = Path(path)
        try:
            data = json.loads(file.read_text("utf-8"))
        except FileNotFoundError as error:
            raise PlanFormatError(f"there is no plan file {file}") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanFormatError(f"{file} is not a plan file: {error}") from error
        return cls.from_dict(data, file.parent)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan file, whole or not at all."""
        from diffeff.files import write_text

        return write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @property
    def digest(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON: names the plan in reports and results."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def stamped(self, model: ModelStamp) -> Plan:
        """The same plan, marked as made for `model`."""
        return Plan(self.methods, model, self.artefacts, self.folder)

    # --- check --------------------------------------------------------------------------------------------------
    def build(self) -> tuple[Method[Any], ...]:
        """The methods of the configs, in the order of their layers."""
        return tuple(sorted((config.build() for config in self.methods), key=lambda m: m.layer))

    def check(self, denoisers: tuple[DenoiserMap, ...]) -> list[PlanCheck]:
        """What each method would act on in this model, before anything is touched. Raises PlanConflict for pairs."""
        rows, bound = [], []
        for method in self.build():
            try:
                rows.append(PlanCheck(method.config.name, True, method.inspect(denoisers[0])))
                method.bind(denoisers)
                bound.append(method)
            except MethodInapplicable as error:
                rows.append(PlanCheck(method.config.name, False, str(error)))
        check_methods(bound, denoisers)
        return rows

    def __str__(self) -> str:
        if not self.methods:
            return "Plan (empty: bit-identical to plain diffusers)"
        lines = [f"  {i + 1}. {_line(config)}" for i, config in enumerate(self.methods)]
        return "\n".join([f"Plan {self.digest}", *lines])


def check_methods(methods: Sequence[Method[Any]], denoisers: tuple[DenoiserMap, ...]) -> None:
    """Raise PlanConflict when two bound methods cannot hold together: same claim on the same site, or a broken need."""
    for a, b in combinations(sorted(methods, key=lambda m: m.layer), 2):
        for denoiser in denoisers:
            _check_pair(a, b, denoiser)


# The few exclusions that no shared claim expresses: (claim, claim) -> reason, alternative.
_EXCLUSIONS: dict[tuple[Claim, Claim], tuple[str, str]] = {
    (Claim.SKIP_STEP, Claim.SKIP_BLOCK): (
        "both would skip work on the same steps and their errors would compound unseen",
        "keep one of them, or use one cache with the site that suits the model",
    ),
    (Claim.SKIP_MODULE, Claim.SLICES): (
        "a cache of attention and feed-forward modules keeps what they return for all rows, and sliced blocks call "
        "them once for every slice",
        "use a cache of blocks or steps",
    ),
}


def _check_pair(a: Method[Any], b: Method[Any], denoiser: DenoiserMap) -> None:
    names = f"{a.config.name} and {b.config.name}"
    held_a, held_b = a.claimed(denoiser), b.claimed(denoiser)
    for claim in held_a.keys() & held_b.keys():
        shared = _shared(held_a[claim], held_b[claim])
        if shared:
            raise PlanConflict(
                f"{names} both need {claim.value} of {denoiser.name} ({shared}). Use one of them, or give them "
                "disjoint blocks."
            )
    for (one, two), (reason, alternative) in _EXCLUSIONS.items():
        if (one in held_a and two in held_b) or (two in held_a and one in held_b):
            raise PlanConflict(f"{names} cannot be combined on {denoiser.name}: {reason}. Instead, {alternative}.")
    for breaker, needer in ((a, b), (b, a)):
        for need in breaker.breaks & needer.needs:
            raise PlanConflict(
                f"{needer.config.name} needs {need.value}, which {breaker.config.name} replaces on {denoiser.name}. "
                f"Leave out one of them."
            )


def _shared(a: frozenset[str], b: frozenset[str]) -> str:
    if "*" in a or "*" in b:
        return "all of it"
    both = sorted(a & b)
    return ", ".join(both[:3]) + (f" and {len(both) - 3} more" if len(both) > 3 else "") if both else ""


def _line(config: Config) -> str:
    values = ", ".join(f"{k}={v!r}" for k, v in config.to_dict().items() if k != "use")
    return f"{config.name}({values})"


def _check_format(data: Any) -> None:
    if not isinstance(data, Mapping) or "diffeff_plan" not in data:
        raise PlanFormatError('not a diffeff plan: the key "diffeff_plan" (the format version) is missing')
    if data["diffeff_plan"] != VERSION:
        raise PlanFormatError(
            f"plan format version {data['diffeff_plan']!r} is not supported; this diffeff reads version {VERSION}. "
            "Update diffeff, or save the plan anew."
        )
    for key in data:
        if key not in _KEYS:
            raise PlanFormatError(f"unknown key {key!r} in the plan. {nearest(str(key), _KEYS)}")
    if not isinstance(data.get("methods", []), list):
        raise PlanFormatError(f"the plan's methods are {data['methods']!r}; expected a list")


def _stamp(data: Any) -> ModelStamp | None:
    if data is None:
        return None
    known = ("family", "fingerprint", "scheduler", "steps", "size")
    if not isinstance(data, Mapping) or not {"family", "fingerprint"} <= data.keys():
        raise PlanFormatError(f"the plan's model is {data!r}; expected family and fingerprint")
    for key in data:
        if key not in known:
            raise PlanFormatError(f"unknown key {key!r} in the plan's model. {nearest(str(key), known)}")
    stamp = ModelStamp(**data)
    return replace(stamp, size=tuple(stamp.size)) if stamp.size else stamp


def _artefacts(data: Any) -> dict[str, Artefact]:
    if not isinstance(data, Mapping):
        raise PlanFormatError(f"the plan's artefacts are {data!r}; expected an object")
    out = {}
    for name, entry in data.items():
        if not isinstance(entry, Mapping) or set(entry) != {"path", "sha256"}:
            raise PlanFormatError(f"artefact {name!r} is {entry!r}; expected path and sha256")
        out[str(name)] = Artefact(str(entry["path"]), str(entry["sha256"]))
    return out
