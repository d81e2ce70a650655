"""`diffeff eval`: the default run on the bundled model, folders, gates and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_features
import pytest
from evalkit import PIXELS, captions, clips, fill
from typer.testing import CliRunner, Result

from diffeff import media
from diffeff.cli import app
from diffeff.cli.group import GATE_FAILED
from diffeff.eval.metrics.table import METRICS

SMALL = ("--size", "32x32", "--frames", "5", "--steps", "9")


def cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *(str(word) for word in words)])


def answer(*words: str | Path) -> dict[str, Any]:
    """The JSON the command prints; there must be nothing else on stdout."""
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return fill(tmp_path / "fake", clips(4, noise=30), captions(4)), fill(tmp_path / "real", clips(4))


def test_the_default_run_needs_no_more_than_a_model_and_a_plan(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    shown = cli("sprites-wan", "--plan", "balanced", "--limit", "3", *SMALL, "-o", report)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == ""
    found = json.loads(report.read_text())
    assert list(dict.fromkeys(result["metric"] for result in found["results"])) == [
        "fid", "kid", "clip", "psnr", "ssim", "adherence",
    ]  # fmt: skip
    assert found["prompts"]["name"] == "sprites"
    assert found["reference"]["kind"] == "plain"
    assert {r["features"]["spec"] for r in found["results"] if r["features"]} == {"sprites"}
    for text in ("FID-sprites", "KID-sprites", "CLIP-sprites", "PSNR", "adherence: colour", "8-bit", "report.html"):
        assert text in shown.stdout
    assert all((tmp_path / f"report{suffix}").is_file() for suffix in (".json", ".md", ".csv", ".items.csv", ".html"))
    assert "<img" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.glob("diffeff-eval/generated/*/*.png"))) == 6


def test_flags_of_methods_make_the_plan(tmp_path: Path) -> None:
    words = ("sprites-wan", "--feature-cache.interval", "4", "--limit", "2", *SMALL, "--metrics", "psnr")
    found = answer(*words, "--no-html", "-o", tmp_path / "r.json")
    assert [entry["interval"] for entry in found["subject"]["plan"]["methods"]] == [4]
    assert found["subject"]["call"]["num_frames"] == 5
    assert set(found["files"]) == {"json", "csv", "items", "markdown"}


def test_folders_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fake, real = folders
    words = (fake, "--reference", real, "--metrics", "psnr, fid", "--features", PIXELS, "-o", tmp_path / "r.json")
    found = answer(*words)
    assert [result["n"] for result in found["results"]] == [4, 4]
    assert found["settings"]["metrics"] == ["psnr", "fid"]
    shown = cli(*words)
    assert "FID-eval_features.pixels" in shown.stdout
    assert "note: " in shown.stdout


def test_a_failed_gate_has_an_exit_code_and_loses_no_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fake, real = folders
    words = (fake, "--reference", real, "--metrics", "psnr,ssim", "-o", tmp_path / "r.json", "--no-html")
    good = cli(*words, "--fail-if", "psnr<5", "--fail-if", "ssim.min<0")
    assert good.exit_code == 0
    assert "gate passed: psnr<5" in good.stdout
    bad = cli(*words, "--fail-if", "psnr<90,ssim<0")
    assert bad.exit_code == GATE_FAILED == 5
    assert "Gate failed: psnr<90: psnr is" in bad.stderr
    assert [gate["failed"] for gate in json.loads((tmp_path / "r.json").read_text())["gates"]] == [True, False]
    assert "5 a gate" in " ".join(cli("--help").stdout.split())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nowhere"], 3, "neither a folder of images or videos, a bundled model"),
        (["FAKE", "--plan", "balanced"], 3, "plan cannot apply"),
        (["FAKE", "--steps", "4"], 3, "steps cannot apply"),
        (["FAKE", "--reference", "REAL", "--metrics", ""], 3, "no metric is asked for"),
        (["FAKE", "--reference", "REAL", "--metrics", "psrn"], 3, "Did you mean 'psnr'"),
        (["FAKE", "--reference", "REAL", "--fail-if", "psnr=3", "--metrics", "psnr"], 3, "psnr<30"),
        (["FAKE", "--reference", "REAL", "--metrics", "fid", "--features", "module:PACKAGE:f"], 3, "module:PACKAGE"),
        (["FAKE", "--metrics", "psnr", "-o", "/proc/nowhere/r.json"], 4, "cannot write /proc/nowhere/"),
        (["FAKE", "--metrics", "psnr", "-o", "report.html"], 4, "the report is JSON"),
        (["sprites-wan", "--plan", "nonsense"], 3, "nonsense"),
        (["sprites-wan", "--size", "32"], 3, "832x480"),
        (["sprites-wan", "--plan", "fast", "--prompts", "nowhere.txt"], 3, "nowhere.txt"),
        (["digits-dit", "--plan", "fast"], 3, "one digit a line"),
        (["FAKE", "--engine", "spark"], 2, "spark"),
        ([], 2, "DIR_OR_MODEL"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    words: list[str], code: int, text: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {"FAKE": str(folders[0]), "REAL": str(folders[1])}
    result = cli(*(places.get(word, word) for word in words), *(() if "-o" in words else ("-o", tmp_path / "r.json")))
    assert result.exit_code == code, result.output
    assert text in " ".join(result.stderr.split())
    assert code == 2 or len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert not (tmp_path / "r.json").exists()


def test_the_plan_of_a_model_folder_is_taken(tmp_path: Path) -> None:
    from tiny import make

    from diffeff.pipeline import DiffEffPipeline

    DiffEffPipeline(make("dit"), plan="fast").save_pretrained(tmp_path / "model")
    (tmp_path / "classes.txt").write_text("1\n2\n")
    words = (
        tmp_path / "model",
        "--prompts",
        tmp_path / "classes.txt",
        "--steps",
        "6",
        "--metrics",
        "psnr",
        "--no-html",
    )
    found = answer(*words, "-o", tmp_path / "r.json")
    assert [entry["use"] for entry in found["subject"]["plan"]["methods"]] == ["feature_cache"]


def test_an_interrupted_run_says_how_to_go_on(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_features, "STOP_AT", [5])
    eval_features.CALLS.clear()
    words = (folders[0], "--reference", folders[1], "--metrics", "fid", "--features", PIXELS, "-o", tmp_path / "r.json")
    stopped = cli(*words)
    assert stopped.exit_code == 130
    assert "the same command continues" in stopped.stderr
    monkeypatch.setattr(eval_features, "STOP_AT", [])
    assert cli(*words).exit_code == 0


def test_videos_and_stills_of_other_formats_are_read(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for number, clip in enumerate(clips(2, frames=5)):
        media.write(tmp_path / "videos" / f"{number}.mp4", clip)
    found = answer(tmp_path / "videos", "--metrics", "flicker,motion", "--no-html", "-o", tmp_path / "r.json")
    assert [result["n"] for result in found["results"]] == [2, 2]


def test_help_names_every_metric_and_teaches() -> None:
    shown = cli("--help").stdout
    assert all(name in shown for name in METRICS)
    assert "diffeff eval sprites-wan --plan balanced" in shown
    assert "\N{PACKAGE}" not in shown
