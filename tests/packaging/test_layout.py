"""The five folders make one package: in a checkout, an editable install and a wheel, from anywhere.

Everything is built from a copy, and probed by interpreters that see the dependencies but no installed diffeff.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("kernels", "pipelines", "apps", "eval")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LIBRARIES = tuple(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
CACHES = shutil.ignore_patterns("__pycache__", "*.py[cod]", ".*")

# The build backend's own hooks, as pip and build call them: no network, no isolated environment.
BUILD = """
import sys
from setuptools import build_meta
folder, *kinds = sys.argv[1:]
for kind in kinds:  # the hooks overwrite sys.argv
    getattr(build_meta, f"build_{kind}")(folder)
"""
WHERE = """
import importlib, importlib.util, json, os, site, sys
if os.environ.get("SITE"):
    site.addsitedir(os.environ["SITE"])  # what Python does with site-packages: reads the .pth of an editable install
for name in ("kernels", "pipelines", "apps", "eval"):
    importlib.import_module(f"diffeff.{name}")
print(json.dumps({name: importlib.util.find_spec(name).origin for name in sys.argv[1:]}))
"""


def python(code: str, *args: str, cwd: Path, path: Sequence[str | Path] = (), env: Mapping[str, str] = {}) -> str:
    """Run `code` in an interpreter without site-packages' .pth files, so without this environment's own diffeff."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = {**clean, **env, "PYTHONPATH": os.pathsep.join(map(str, [*path, *LIBRARIES]))}
    command = [sys.executable, "-S", "-c", code, *args]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def installed_name(file: Path) -> str:
    """Where a file of the repository stands once installed."""
    return (file if file.parts[0] == "diffeff" else Path("diffeff") / file).as_posix()


def sources(root: Path) -> set[Path]:
    """Every file of the five folders, relative to the repository root."""
    files = (file for folder in ("diffeff", *BESIDE) for file in (root / folder).rglob("*"))
    return {file.relative_to(root) for file in files if file.is_file() and "__pycache__" not in file.parts}


@dataclass(frozen=True)
class Built:
    """A copy of the repository and what was built from it. `installed` holds the wheel, `editable` the editable one."""

    copy: Path
    sdist: Path
    wheel: Path
    installed: Path
    editable: Path


def _copy(to: Path) -> Path:
    for folder in ("diffeff", *BESIDE, "docs", "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, to / folder, ignore=CACHES)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, to)
    return to


def _pip_install(wheel: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel is built from the unpacked sdist, as installers do that find no wheel."""
    tmp = tmp_path_factory.mktemp("packaging")
    copy = _copy(tmp / "copy")
    for name in ("dist", "unpacked", "wheel"):
        (tmp / name).mkdir()
    python(BUILD, str(tmp / "dist"), "sdist", "editable", cwd=copy)
    (sdist,), (editable,) = (tmp / "dist").glob("*.tar.gz"), (tmp / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp / "unpacked", filter="data")
    (source,) = (tmp / "unpacked").iterdir()
    python(BUILD, str(tmp / "wheel"), "wheel", cwd=source)
    (wheel,) = (tmp / "wheel").glob("*.whl")
    installed = _pip_install(wheel, tmp / "installed")
    return Built(copy, sdist, wheel, installed, _pip_install(editable, tmp / "editable"))


def expected(root: Path, *, mapped: bool) -> dict[str, str]:
    """The `__init__.py` of every package: in the repository's layout (`mapped`) or the installed one."""
    files = {}
    for name in SETUPTOOLS["packages"]:
        path = Path(*name.split("."))
        if mapped and len(path.parts) > 1 and path.parts[1] in BESIDE:
            path = path.relative_to("diffeff")
        files[name] = str(root / path / "__init__.py")
    return files


def where(cwd: Path, path: Sequence[Path] = (), **env: str) -> dict[str, str]:
    """Where an interpreter started in `cwd` finds each package. `-c` puts `cwd` on its path, like a REPL does."""
    found: dict[str, str] = json.loads(python(WHERE, *SETUPTOOLS["packages"], cwd=cwd, path=path, env=env))
    return {name: os.path.abspath(origin) for name, origin in found.items()}  # noqa: PTH100 (origin may be relative)


def test_the_list_of_packages_equals_the_tree() -> None:
    inits = {file for file in sources(ROOT) if file.name == "__init__.py"}
    tree = {installed_name(file).removesuffix("/__init__.py").replace("/", ".") for file in inits}
    assert set(SETUPTOOLS["packages"]) == tree
    assert {file.parent for file in sources(ROOT) if file.suffix == ".py"} == {file.parent for file in inits}
    assert SETUPTOOLS["package-dir"] == {"diffeff": "diffeff"} | {f"diffeff.{name}": name for name in BESIDE}


@pytest.mark.slow
def test_checkout_works_without_installing(built: Built, tmp_path: Path) -> None:
    assert where(built.copy) == expected(built.copy, mapped=True)
    assert where(tmp_path, [built.copy]) == expected(built.copy, mapped=True)


@pytest.mark.slow
def test_editable_install_works(built: Built, tmp_path: Path) -> None:
    site = str(built.editable)
    # On the path as well: a finder of the same name stands among the libraries if diffeff is installed there.
    assert where(tmp_path, [built.editable], SITE=site) == expected(built.copy, mapped=True)
    assert where(built.copy, [built.editable], SITE=site) == expected(built.copy, mapped=True)


@pytest.mark.slow
def test_wheel_works(built: Built, tmp_path: Path) -> None:
    assert where(tmp_path, [built.installed]) == expected(built.installed, mapped=False)
    assert where(built.copy, [built.installed], PYTHONSAFEPATH="1") == expected(built.installed, mapped=False)
    # Without safe path the checkout shadows the wheel: as a whole, never a mixture of the two.
    assert where(built.copy, [built.installed]) == expected(built.copy, mapped=True)


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file(built: Built) -> None:
    files = sources(built.copy)
    # Measurements are kept with the source; who installs the package does not need them.
    shipped = {installed_name(file) for file in files if not file.is_relative_to("eval/results")}
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("diffeff/")} == shipped
    assert {name.split("/")[0] for name in names} == {"diffeff", f"diffeff-{_version(built)}.dist-info"}
    with tarfile.open(built.sdist) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    tests = {file.relative_to(built.copy) for file in (built.copy / "tests").rglob("*.py")}
    assert files | tests | {Path(name) for name in ("LICENSE", "README.md", "pyproject.toml", "Makefile")} <= packed


def _version(built: Built) -> str:
    (found,) = importlib.metadata.distributions(path=[str(built.installed)])
    return found.version


@pytest.mark.slow
def test_metadata(built: Built) -> None:
    (found,) = importlib.metadata.distributions(path=[str(built.installed)])
    (script,) = found.entry_points
    assert (script.group, script.name, script.value) == ("console_scripts", "diffeff", "diffeff.cli:main")
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.version == python("import diffeff; print(diffeff.__version__)", cwd=built.copy).strip()
    assert not any("torchvision" in requirement for requirement in found.requires or ())


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A folder with a stand-in for Hugging Face's `kernels`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .loader import get_kernel\n")
    (tmp_path / "kernels" / "loader.py").write_text("def get_kernel(name): return name\n")
    return tmp_path


def test_hugging_faces_kernels_is_not_shadowed(hugging_face: Path) -> None:
    code = """
import kernels, kernels.loader, importlib
from kernels import get_kernel
assert get_kernel("x") == "x"
import diffeff.kernels
print(importlib.import_module("kernels").__file__, diffeff.kernels.__file__, sep="\\n")
"""
    theirs = str(hugging_face / "kernels" / "__init__.py")
    assert python(code, cwd=ROOT, path=[hugging_face]).split() == [theirs, str(ROOT / "kernels" / "__init__.py")]


@pytest.mark.slow
def test_without_hugging_faces_kernels_nobody_takes_ours_for_it() -> None:
    """transformers imports whatever `kernels` it finds; an ImportError there would break its own import."""
    code = """
import transformers.utils.import_utils, diffusers.utils.import_utils
print(transformers.utils.import_utils.is_kernels_available(), diffusers.utils.import_utils.is_kernels_available())
import kernels
assert kernels.__file__ is None
assert not hasattr(kernels, "get_kernel")
"""
    if importlib.util.find_spec("kernels") is not None:
        pytest.skip("Hugging Face's kernels is installed")
    assert python(code, cwd=ROOT).split()[-2:] == ["False", "False"]
