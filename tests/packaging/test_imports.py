"""Who may import whom, and what `import diffeff` may load."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffeff
from diffeff import errors

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("kernels", "pipelines", "apps", "eval")

# What each part may import of ours, besides itself. What is not named here may import all but the faces.
ALLOWED: dict[str, tuple[str, ...]] = {
    "diffeff.errors": (),
    "diffeff.kernels": (),
    "diffeff.anatomy": ("diffeff.errors",),
    "diffeff.core": ("diffeff.errors", "diffeff.anatomy.types"),
    "diffeff.methods": (
        "diffeff.errors",
        "diffeff.anatomy.types",
        "diffeff.anatomy.layers",
        "diffeff.anatomy.block_io",
        "diffeff.core",
        "diffeff.kernels",
    ),
    "diffeff.pipelines": ("diffeff.errors", "diffeff.anatomy.types", "diffeff.core", "diffeff.methods"),
    "diffeff.search": (
        "diffeff.errors",
        "diffeff.anatomy.types",
        "diffeff.core",
        "diffeff.methods",
        "diffeff.eval",
        "diffeff.files",
        "diffeff.plan",
        "diffeff.presets",
        "diffeff.report",
        "diffeff.stamp",
    ),
}
FACES = ("diffeff.cli", "diffeff.apps")
LIGHT = {"diffeff", "diffeff._checkout"}


def modules() -> dict[str, Path]:
    """Every module of ours by its installed name."""
    found = {}
    for folder in ("diffeff", *BESIDE):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "diffeff" else ("diffeff", *parts))
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def targets(node: ast.AST, package: str) -> Iterator[str]:
    """The full names that an import statement in `package` names: modules, and what is taken out of them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(file: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that `file` imports, at the top, in functions and for type checking."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for name in targets(node, package):
            # A public name that `diffeff` itself hands out stands for the module it lives in.
            public = name.removeprefix("diffeff.") if name.startswith("diffeff.") else ""
            if public in diffeff.__all__ and name not in MODULES:
                name = diffeff._HOMES.get(public, "diffeff.errors") + f".{public}"
            yield getattr(node, "lineno", 0), name


def ours() -> Iterator[tuple[str, str, str]]:
    """Importer, imported and place of every import of ours by ours."""
    for module, file in MODULES.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for line, name in imports(file, package):
            if name.split(".")[0] in ("diffeff", *BESIDE):
                yield module, name, f"{file.relative_to(ROOT)}:{line} imports {name}"


IMPORTS = list(ours())


def test_the_walk_sees_imports() -> None:
    """Guards the checks below against finding nothing because nothing was looked at."""
    seen = {(importer, imported) for importer, imported, _ in IMPORTS}
    assert ("diffeff.plan", "diffeff.errors.PlanConflict") in seen
    assert ("diffeff.core.method", "diffeff.core.config.Config") in seen  # under TYPE_CHECKING


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_stands_below_them(part: str) -> None:
    allowed = (part, "diffeff.__version__", *ALLOWED[part])
    inside = [(imported, place) for importer, imported, place in IMPORTS if is_in(importer, part)]
    assert [place for imported, place in inside if not any(is_in(imported, name) for name in allowed)] == []


def test_nothing_imports_the_faces() -> None:
    """The command line may start the web app; `python -m diffeff` is the command line."""
    below = [row for row in IMPORTS if row[0] != "diffeff.__main__" and not any(is_in(row[0], face) for face in FACES)]
    assert [place for _, imported, place in below if any(is_in(imported, face) for face in FACES)] == []


def test_mapped_folders_are_imported_by_their_installed_names() -> None:
    """`import kernels` is Hugging Face's package; `from diffeff import eval` fails where a name hides the folder."""
    bare = [place for _, imported, place in IMPORTS if imported.split(".")[0] in BESIDE]
    taken = [place for _, imported, place in IMPORTS if imported in {f"diffeff.{name}" for name in BESIDE}]
    assert bare == []
    assert taken == []


def loaded_by(statement: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter."""
    code = f"import json, sys; old = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - old)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_diffeff_loads_nothing_but_the_standard_library() -> None:
    loaded = {name for name in loaded_by("import diffeff") if name.split(".")[0] not in sys.stdlib_module_names}
    assert loaded == LIGHT


@pytest.mark.slow
def test_the_pipeline_loads_no_face_and_no_optional_dependency() -> None:
    loaded = loaded_by("from diffeff import DiffEffPipeline, Plan")
    assert {"gradio", "ray", "typer", "rich", "torchmetrics", "xformers", *FACES} & loaded == set()


def test_every_public_name_is_there_and_every_error_is_public() -> None:
    assert all(getattr(diffeff, name) is not None for name in diffeff.__all__)
    assert set(errors.__all__) - {"nearest"} <= set(diffeff.__all__)
    assert set(diffeff.__all__) <= set(dir(diffeff))
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = diffeff.Pipeline
