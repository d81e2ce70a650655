"""`diffeff generate` and `inspect` on real models: a tiny random one from a folder, and the bundled default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make
from typer.testing import CliRunner, Result

from diffeff import media
from diffeff.cli import app
from diffeff.cli.progress import Stages

CAPTION = "a red circle moving left, camera pans right"


def cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words: str | Path) -> dict[str, Any]:
    """The JSON a command prints; there must be nothing else on stdout."""
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny class-conditional pipeline with random weights, saved as diffusers saves it."""
    place = tmp_path_factory.mktemp("model")
    make("dit").save_pretrained(place)
    return place


def sprites(*words: str | Path) -> list[str | Path]:
    """The bundled default at a fraction of its size, so that a run takes a tenth of a second."""
    return ["generate", CAPTION, "--size", "32x32", "--frames", "5", "--steps", "8", *words]


# --- a folder -------------------------------------------------------------------------------------------------------
def test_a_picture_from_a_folder(folder: Path, tmp_path: Path) -> None:
    found = answer("generate", "--class", "3", "-m", folder, "--steps", "3", "-o", tmp_path / "a.png")
    assert found["files"] == {"output": str(tmp_path / "a.png")}
    assert found["adherence"] is None
    assert found["call"]["class_labels"] == [3]
    assert media.read(tmp_path / "a.png").shape == (1, 8, 8, 3)


def test_the_same_seed_gives_the_same_bytes_and_lossless_changes_nothing(folder: Path, tmp_path: Path) -> None:
    for name, more in {"a": [], "b": [], "c": ["--plan", "lossless"], "d": ["--seed", "1"]}.items():
        words = ["generate", "3", "-m", folder, "--steps", "3", "-o", tmp_path / f"{name}.png", *more]
        assert cli(*words).exit_code == 0
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert first != (tmp_path / "d.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--class", "1000"], 3, "0 to 999"),
        (["--class", "cat"], 3, "no class 'cat'"),
        ([], 3, "--class"),
        (["3", "--frames", "5"], 3, "takes no --frames"),
        (["3", "--size", "32"], 3, "832x480"),
        (["3", "-o", "clip.mp4"], 4, "still pictures"),
        (["3", "--kv-downsample.stride", "99"], 3, "allowed: 1 <= int <= 8"),
    ],
)
def test_what_the_model_cannot_do_is_said(folder: Path, words: list[str], code: int, text: str) -> None:
    result = cli("generate", "-m", folder, "--steps", "2", *words)
    assert result.exit_code == code, result.output
    assert text in result.stderr
    assert result.stdout == ""


def test_a_plan_in_the_model_folder_is_the_default(folder: Path, tmp_path: Path) -> None:
    from diffeff.pipeline import DiffEffPipeline

    place = tmp_path / "planned"
    DiffEffPipeline.from_pretrained(folder, plan="fast").save_pretrained(place)
    words = ["generate", "3", "-m", place, "--steps", "8", "-o", tmp_path / "a.png"]
    assert [entry["use"] for entry in answer(*words)["plan"]["methods"]] == ["feature_cache"]
    assert answer(*words, "--no-feature-cache")["plan"]["methods"] == []
    assert answer(*words, "--plan", "lossless")["plan"]["methods"] == []


def test_inspect_describes_without_a_plan(folder: Path) -> None:
    found = answer("inspect", folder)
    (denoiser,) = found["denoisers"]
    assert denoiser["name"] == "transformer"
    assert found["parameters"]["transformer"] > 0
    assert {method["name"] for method in found["methods"]} >= {"feature_cache", "int8_weights"}
    assert all(method["on"] for method in found["methods"])
    shown = cli("inspect", folder).stdout
    for text in ("DiTPipeline", "transformer", "guidance", "feature_cache"):
        assert text in shown


def test_a_plan_is_checked_against_a_model(folder: Path) -> None:
    found = answer("plan", "check", "balanced", "-m", folder)
    assert found["ok"]
    assert [row["method"] for row in found["checks"]] == ["feature_cache"]
    assert "feature_cache" in cli("plan", "check", "balanced", "-m", folder).stdout


# --- the bundled default --------------------------------------------------------------------------------------------
def test_a_clip_from_the_bundled_default(tmp_path: Path) -> None:
    found = answer(*sprites("-o", tmp_path / "a.mp4", "--enlarge", "2"))
    assert found["model"] == "sprites-wan"
    assert set(found["adherence"]) == {"colour", "shape", "motion", "camera"}
    assert found["report"]["seconds"]["denoise"] > 0
    assert media.read(tmp_path / "a.mp4").shape == (5, 64, 64, 3)


def test_the_card_gives_the_defaults(tmp_path: Path) -> None:
    from diffeff.zoo import bundled

    found = answer("generate", CAPTION, "--steps", "2", "-o", tmp_path / "a.gif")
    best = bundled.recommended("sprites-wan")
    assert found["call"]["guidance_scale"] == best.guidance
    assert media.read(tmp_path / "a.gif").shape == (best.frames, best.height, best.width, 3)


def test_words_end_with_what_came_out(tmp_path: Path) -> None:
    shown = cli(*sprites("-o", tmp_path / "a.gif", "--enlarge", "2", "--feature-cache.interval", "2")).stdout
    for text in ("feature_cache", "adherence: colour", str(tmp_path / "a.gif"), "64x64, 5 frames"):
        assert text in shown
    assert "not measurable" in cli("generate", "a dog", *sprites("-o", tmp_path / "b.gif")[2:]).stdout


def test_compare_writes_everything_and_it_can_be_read_back(tmp_path: Path) -> None:
    found = answer(*sprites("-o", tmp_path / "a.mp4", "--compare", "--rounds", "1"))
    assert found["plan"]["methods"], "without a plan or flags it takes the preset balanced"
    files = {name: Path(place) for name, place in found["files"].items()}
    for name in ("plain", "accelerated"):
        assert media.read(files[name]).shape == (5, 32, 32, 3)
    both = media.read(files["side_by_side"])
    assert both.shape[0] == 5
    assert both.shape[2] > 2 * 256
    assert media.read(files["contact_sheet"]).shape[1] > 3 * 128
    assert json.loads(files["report_json"].read_text())["comparison"] == found["comparison"]
    assert "| plain | 8 |" in files["report_markdown"].read_text()
    plain, fast, *_ = found["comparison"]["arms"]
    assert plain["identical"]
    assert fast["psnr"] is None or fast["psnr"] > 5
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_compare_ends_with_an_honest_summary(tmp_path: Path) -> None:
    shown = cli(*sprites("-o", tmp_path / "a.gif", "--compare", "--rounds", "1")).stdout
    for text in ("x against plain", "fidelity to plain", "adherence, accelerated", "not a benchmark", "contact sheet"):
        assert text in shown


def test_comparing_lossless_is_bit_identical(tmp_path: Path) -> None:
    words = sprites("-o", tmp_path / "a.gif", "--compare", "--rounds", "1", "--plan", "lossless")
    arms = answer(*words)["comparison"]["arms"]
    assert [arm["identical"] for arm in arms[:2]] == [True, True]
    assert np.array_equal(media.read(tmp_path / "a.gif"), media.read(tmp_path / "a.plain.gif"))


def _interrupt_at(count: int) -> Callable[..., None]:
    """A stand-in for Stages.advance that is interrupted at its call number `count`."""
    seen = 0

    def advance(self: Stages, step: float = 1) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise KeyboardInterrupt

    return advance


def test_an_interrupt_stops_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stages, "advance", _interrupt_at(3))
    result = cli(*sprites("-o", tmp_path / "a.mp4", "--json"))
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "Interrupted.\n"
    assert not list(tmp_path.iterdir())


def test_an_interrupted_comparison_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stages, "advance", _interrupt_at(11))
    result = cli(*sprites("-o", tmp_path / "a.mp4", "--compare"))
    assert result.exit_code == 130
    assert str(tmp_path / "a.plain.mp4") in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.plain.mp4"]
    assert len(media.read(tmp_path / "a.plain.mp4")) == 5
