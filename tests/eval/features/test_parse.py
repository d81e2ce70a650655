"""From a spec to a source: every kind, and every way to write one wrongly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffeff.errors import ConfigError, ModelLoadError, UnknownName
from diffeff.eval.features.parse import KINDS, source
from diffeff.eval.features.source import FeatureSource


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("inceptoin:x.pth", "Did you mean 'inception'.*module:PACKAGE:FUNCTION"),
        ("", "there are no features ''"),
        ("builtin-random", "there are no features 'builtin-random'"),
    ],
)
def test_unknown_kinds_name_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        source(spec)


@pytest.mark.parametrize("spec", ["inception", "inception:", "clip", "clip: ", "module"])
def test_a_missing_argument_is_asked_for(spec: str) -> None:
    with pytest.raises(ConfigError, match=f"write {KINDS[spec.partition(':')[0]].form}"):
        source(spec)


def test_sprites_takes_no_argument() -> None:
    with pytest.raises(ConfigError, match="'sprites' take no argument, got 'small'"):
        source("sprites:small")


@pytest.mark.parametrize("spec", ["inception:absent.pth", "clip:./absent", "module:absent.py:f"])
def test_missing_files_are_one_clear_error(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=r"there is no (file|folder) absent"):
        source(spec)


def test_the_device_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="cannot run on device 'warp'"):
        source("inception:absent.pth", device="warp")


def test_a_colon_in_the_path_stays_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "mine.py").write_text("def f(x):\n    return x.float().mean((2, 3))\n")
    made = source(f" module:{folder}/mine.py:f ")
    assert isinstance(made, FeatureSource)
    assert made.spec == f"module:{folder}/mine.py:f"


def test_sprites_is_bundled() -> None:
    made = source("sprites")
    assert isinstance(made, FeatureSource)
    assert made.label == "sprites"


def test_the_table_is_read_without_loading_transformers() -> None:
    code = "import sys, diffeff.eval.features.parse; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
