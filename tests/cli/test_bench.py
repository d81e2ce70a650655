"""`diffeff bench` as users call it: what is asked for is measured; rows come out as tables, JSON and HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_rows import bench_rows
from typer.testing import CliRunner, Result

from diffeff.cli import app
from diffeff.errors import DiffEffError
from diffeff.eval.bench import matrix, run, scaling
from diffeff.eval.bench.run import BenchSettings
from diffeff.eval.settings import CallSettings


def cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(word) for word in words)])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BenchSettings]:
    """What the bench was asked for, in place of measuring it."""
    seen: list[BenchSettings] = []

    def stand_in(settings: BenchSettings, observe: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
        seen.append(settings)
        observe(0, 2, "first run: plain")
        return bench_rows(settings.model)

    monkeypatch.setattr(run, "run_bench", stand_in)
    return seen


def test_a_model_alone_is_a_bench_of_the_presets_against_fewer_steps(asked: list[BenchSettings]) -> None:
    result = cli("sprites-wan")
    assert result.exit_code == 0, result.output
    (settings,) = asked
    assert settings.model == "sprites-wan"
    assert settings.plans == ("high", "balanced", "fast")
    assert settings.against == ("fewer-steps",)
    assert settings.call == CallSettings()
    assert settings.out == Path("bench.jsonl")
    assert cli("run", "sprites-wan").exit_code == 0
    assert asked[1] == settings


def test_every_option_arrives(asked: list[BenchSettings], tmp_path: Path) -> None:
    words = "--plans balanced,fast --against diffusers:fbcache@threshold=0.2,fewer-steps --sweep --prompts general"
    words += " --limit 7 --seed 3 --steps 12 --guidance 2.5 --size 64x32 --frames 5 --device cpu --dtype float16"
    words += f" --threads 2 --no-memory --patience 60 --out {tmp_path / 'x.jsonl'}"
    assert cli(*words.split(), "m").exit_code == 0
    assert asked == [
        BenchSettings(
            model="m",
            plans=("balanced", "fast"),
            against=("diffusers:fbcache@threshold=0.2", "fewer-steps"),
            sweep=True,
            prompts="general",
            limit=7,
            seed=3,
            call=CallSettings(steps=12, guidance=2.5, width=64, height=32, frames=5),
            device="cpu",
            dtype="float16",
            threads=2,
            memory=False,
            patience=60,
            out=tmp_path / "x.jsonl",
        )
    ]


def test_only_what_is_named_is_compared(asked: list[BenchSettings]) -> None:
    cli("m", "--against", "deepcache")
    cli("m", "--plans", "fast")
    assert [(s.plans, s.against) for s in asked] == [((), ("deepcache",)), (("fast",), ())]


def test_the_table_tells_results_errors_and_idle_arms_apart(asked: list[BenchSettings]) -> None:
    shown = cli("sprites-wan").stdout
    (plain,) = re.findall(r"^plain .*", shown, re.MULTILINE)
    assert "reference" in plain
    (fast,) = re.findall(r"^fast .*", shown, re.MULTILINE)
    for text in ("3.19x", "43.6 dB", "48 of 50", "MiB"):
        assert text in fast
    assert "refused" in shown
    assert "no attention of 1024 tokens" in shown
    assert "did nothing" in shown
    assert "'WanPipeline' object has no attribute 'unet'" in shown
    assert "rows appended to bench.jsonl" in shown


def test_json_is_the_rows_alone(asked: list[BenchSettings]) -> None:
    result = cli("m", "--json")
    assert json.loads(result.stdout)["rows"] == bench_rows("m")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["m", "--plans", "balancd"], 3, "balanced"),
        (["m", "--against", "diffusers:fbcash"], 3, "diffusers:fbcache"),
        (["m", "--size", "64"], 3, "832x480"),
        (["m", "--limit", "0"], 2, "limit"),
        (["m", "--plans", "fast", "--out", "."], 4, "folder of that name"),
        (["report", "missing.jsonl"], 3, "missing.jsonl"),
        (["scaling", "--plan", "balancd"], 3, "balanced"),
        (["scaling", "--points", "frames=a,b,c"], 3, "AXIS=A,B,C"),
        (["scaling", "--points", "frames=5,9"], 3, "3 different"),
        (["matrix", "--families", "wann"], 3, "wan"),
        (["matrix", "--out", "."], 4, "folder of that name"),
        (["scaling", "--out", "."], 4, "folder of that name"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    words: list[str], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*words)
    assert result.exit_code == code, result.output
    assert text in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_an_interrupt_says_where_it_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_bench", stopped)
    result = cli("m", "--plans", "fast", "--out", tmp_path / "b.jsonl")
    assert result.exit_code == 130
    assert str(tmp_path / ".b.work") in result.stderr
    assert "goes on from there" in result.stderr


def test_an_error_of_the_bench_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise DiffEffError("plain itself fails")

    monkeypatch.setattr(run, "run_bench", failing)
    result = cli("m", "--plans", "fast")
    assert (result.exit_code, result.stderr) == (3, "Error: plain itself fails\n")


MATRIX = {
    "benchmark": "matrix",
    "family": "wan",
    "method": "int8_weights",
    "status": "works",
    "reason": "",
    "compute_left": 0.5,
    "relative_difference": 0.01,
    "environment": {},
}
SCALING = {
    "benchmark": "scaling",
    "model": "sprites-wan",
    "axis": "frames",
    "points": [],
    "slope_time": {"value": 1.25, "low": 1.1, "high": 1.4},
    "slope_memory": None,
    "plan": None,
    "environment": {},
}


def _standing_in(seen: list[Any], row: dict[str, Any]) -> Callable[..., Iterator[dict[str, Any]]]:
    def measure(settings: Any, observe: Callable[[int, int, str], None]) -> Iterator[dict[str, Any]]:
        seen.append(settings)
        observe(0, 1, "x")
        yield row

    return measure


def test_matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(matrix, "measure_matrix", _standing_in(seen, MATRIX))
    out = tmp_path / "m.jsonl"
    shown = cli("matrix", "--families", "wan,flux", "--methods", "int8_weights", "--pairs", "--steps", "4", "-o", out)
    assert shown.exit_code == 0, shown.output
    expected = matrix.MatrixSettings(families=("wan", "flux"), methods=("int8_weights",), pairs=True, steps=4)
    assert seen == [expected]
    assert "works" in shown.stdout
    assert "50 %" in shown.stdout
    assert json.loads(out.read_text()) == MATRIX
    assert json.loads(cli("matrix", "--json").stdout) == {"rows": [MATRIX]}


def test_scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(scaling, "measure_scaling", _standing_in(seen, SCALING))
    out = tmp_path / "s.jsonl"
    words = ["--axes", "frames,steps", "--plan", "fast", "--repeats", "1", "--memory", "off", "--device", "cpu"]
    words += ["--points", "frames=5,9,13", "--points", "tokens=32x48,48x48,64x64", "-o", out]
    shown = cli("scaling", "sprites-wan", *words)
    assert shown.exit_code == 0, shown.output
    assert (seen[0].model, seen[0].axes, seen[0].repeats, seen[0].memory) == (
        "sprites-wan",
        ("frames", "steps"),
        1,
        "off",
    )
    assert seen[0].points == {"frames": (5, 9, 13), "tokens": ((48, 32), (48, 48), (64, 64))}
    assert "1.25 (1.10 to 1.40)" in shown.stdout
    assert json.loads(out.read_text()) == SCALING


@pytest.mark.parametrize(("name", "row"), [("matrix", MATRIX), ("scaling", SCALING)])
def test_stopped_rows_that_are_finished_are_in_the_file(
    name: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: object) -> Iterator[dict[str, Any]]:
        yield row
        raise KeyboardInterrupt

    module = {"matrix": matrix, "scaling": scaling}[name]
    monkeypatch.setattr(module, f"measure_{name}", stopped)
    out = tmp_path / "rows.jsonl"
    out.write_text('{"benchmark": "other"}')
    result = cli(name, "-o", out)
    assert result.exit_code == 130
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"benchmark": "other"}, row]
    assert "1 rows" in result.stderr


def test_the_report_is_one_page_without_requests(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in bench_rows()))
    result = cli("report", file, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "sprites-wan" in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
