"""Loading and saving model folders safely: safetensors only, no foreign code, one clear error for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffeff.errors import ArtefactError, ModelLoadError, OutputError, UnknownName, nearest
from diffeff.files import sha256
from diffeff.plan import Artefact, Plan

__all__ = ["PLAN_FILE", "artefacts", "load", "save"]

PLAN_FILE = "diffeff_plan.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load(name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The diffusers pipeline behind a bundled name, a local folder or a hub id."""
    from diffeff.zoo import bundled

    text = os.fspath(name)
    if text in bundled.NAMES:
        return bundled.load(text, **kwargs)
    path = Path(text)
    if path.exists() or path.is_absolute() or text.startswith("."):
        check_folder(path, **kwargs)
    elif text.count("/") != 1:
        raise UnknownName(
            f"{text!r} is neither a bundled model, an existing folder, nor a hub id (owner/name). "
            f"{nearest(text, bundled.NAMES)}"
        )
    return _from_pretrained(text, kwargs)


def _from_pretrained(name: str, kwargs: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    options = {"use_safetensors": True} | kwargs
    try:
        return DiffusionPipeline.from_pretrained(name, **options)
    except (OSError, SafetensorError, ValueError) as error:
        hint = ""
        if options["use_safetensors"]:
            hint = (
                " Only safetensors weights are read; use_safetensors=False also reads pickled ones, if you trust them."
            )
        raise ModelLoadError(f"cannot load {name}: {error}.{hint}") from error


def check_folder(folder: Path, *, use_safetensors: bool | None = True, **kwargs: Any) -> None:
    """Look at a local model folder before anything of it is loaded. Raises ModelLoadError."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelLoadError(f"{folder} is no diffusers pipeline folder: it has no model_index.json")
    try:
        entries = json.loads(index.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{index} cannot be read: {error}") from error
    consented = bool(kwargs.get("trust_remote_code")) or "custom_pipeline" in kwargs
    for component, entry in entries.items():
        if component.startswith("_") or not isinstance(entry, list) or entry[0] is None or component in kwargs:
            continue
        if not (folder / component).is_dir():
            raise ModelLoadError(f"{folder} lacks the component {component!r} ({entry[-1]}) named in model_index.json")
        if (folder / component / f"{entry[0]}.py").exists() and not consented:
            raise ModelLoadError(
                f"{folder / component} brings its own code ({entry[0]}.py), which does not run without your consent: "
                "pass trust_remote_code=True if you trust it"
            )
        _check_weights(folder / component, bool(use_safetensors))
    if isinstance(entries.get("_class_name"), list) and not consented:
        raise ModelLoadError(f"{folder} names a pipeline class of its own; pass trust_remote_code=True if you trust it")


def _check_weights(folder: Path, safe_only: bool) -> None:
    safe = sorted(folder.glob("*.safetensors"))
    for file in safe:
        check_safetensors(file)
    pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in _PICKLES]
    if safe_only and pickles and not safe:
        raise ModelLoadError(
            f"{folder} has only pickled weights ({', '.join(pickles)}), which can run code when loaded. Convert them "
            "to safetensors, or pass use_safetensors=False if you trust where they come from."
        )


def check_safetensors(file: Path) -> None:
    """Raise ModelLoadError when a safetensors file is truncated or its header is broken; reads the header alone."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its header would be {length} bytes long, the file has {size}")
            header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"it should be {8 + length + max(ends, default=0)} bytes long and is {size}")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file} is corrupted or truncated: {error}. Fetch it again.") from error


def save(
    pipe: Any, folder: Path, plan: Plan | None, tensors: Mapping[str, Mapping[str, Tensor]], kwargs: Mapping[str, Any]
) -> Path:
    """Write a pipeline folder with a plan into a new place, then move it in: the target is whole or untouched."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write the folder {folder}: a file of that name is there")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}. Choose another place.") from error
    try:
        temporary.chmod(0o755)
        pipe.save_pretrained(temporary, **kwargs)
        if plan is not None:
            _save_artefacts(temporary, plan, tensors).save(temporary / PLAN_FILE)
        _move_in(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _move_in(temporary: Path, folder: Path) -> None:
    aside = None
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "folder"
        folder.rename(aside)
    temporary.rename(folder)
    if aside is not None:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _save_artefacts(folder: Path, plan: Plan, tensors: Mapping[str, Mapping[str, Tensor]]) -> Plan:
    entries: dict[str, Artefact] = {}
    for name, values in tensors.items():
        if not values:
            continue
        file = folder / f"diffeff_{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, file)
        entries[name] = Artefact(file.name, sha256(file))
    return Plan(plan.methods, plan.model, entries)


def artefacts(plan: Plan) -> dict[str, dict[str, Tensor]]:
    """The tensors a plan refers to, by artefact name, after checking their checksums. Raises ArtefactError."""
    loaded = {}
    for name, entry in plan.artefacts.items():
        folder = (plan.folder or Path()).resolve()
        file = (folder / entry.path).resolve()
        if not file.is_relative_to(folder):
            raise ArtefactError(f"artefact {name!r} points outside the plan's folder: {entry.path}")
        if not file.is_file():
            raise ArtefactError(f"artefact {name!r} of the plan is missing: {file}")
        found = sha256(file)
        if found != entry.sha256:
            raise ArtefactError(f"{file} was changed since the plan was saved: sha256 {found}, expected {entry.sha256}")
        loaded[name] = load_file(file)
    return loaded
