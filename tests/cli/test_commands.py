"""Commands that need no model: help, methods, plans, doctor, models, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from diffeff.cli import COMMANDS, app
from diffeff.cli import traps as traps_module
from diffeff.methods.table import TABLE
from diffeff.presets import PRESETS


def cli(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def answer(*words: str) -> dict[str, Any]:
    """The JSON a command prints; there must be nothing else on stdout."""
    result = cli(*words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def plan_file(folder: Path, *methods: dict[str, Any], **more: Any) -> str:
    path = folder / "plan.json"
    path.write_text(json.dumps({"diffeff_plan": 1, "methods": list(methods), **more}))
    return str(path)


# --- help and start -------------------------------------------------------------------------------------------------
def test_help_lists_the_commands_and_teaches() -> None:
    shown = cli("--help")
    assert shown.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in shown.stdout
    assert "diffeff generate" in shown.stdout
    assert "Exit codes" in shown.stdout


@pytest.mark.parametrize("name", [*COMMANDS, "plan check", "plan show"])
def test_every_command_has_help_with_examples(name: str) -> None:
    shown = cli(*name.split(), "--help")
    assert shown.exit_code == 0
    assert name.split()[-1] in shown.stdout
    assert name == "plan" or "Examples" in shown.stdout


def test_help_of_generate_lists_every_method() -> None:
    shown = cli("generate", "--help").stdout
    for name in TABLE:
        assert f"--{name.replace('_', '-')}" in shown


def test_starting_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, diffeff.cli; sys.exit(bool({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_version() -> None:
    from diffeff import __version__

    assert cli("--version").stdout == f"diffeff {__version__}\n"


# --- exit codes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["generat"], 2),
        (["methods", "--jsn"], 2),
        (["generate", "x", "--steps", "many"], 2),
        (["generate", "x", "--steps", "0"], 2),
        (["methods", "feature_cach"], 3),
        (["plan", "show", "balancd"], 3),
        (["plan", "check", "missing.json"], 3),
        (["generate", "x", "-m", "sprites-wam"], 3),
        (["generate", "x", "-m", "./no-such-folder"], 3),
        (["generate", "x", "--plan", "quick"], 3),
        (["generate", "x", "--device", "mps" if sys.platform == "linux" else "cuda"], 3),
        (["generate", "x", "-o", "out.avi"], 4),
        (["generate", "x", "-o", "/dev/null/out.mp4"], 4),
    ],
)
def test_exit_codes(words: list[str], code: int) -> None:
    result = cli(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code > 2:
        assert result.stdout == ""
        assert result.stderr.startswith("Error:")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["methods", "feature_cach"], "Did you mean 'feature_cache'?"),
        (["plan", "show", "balancd"], "Did you mean 'balanced'?"),
        (["generate", "x", "-m", "sprites-wam"], "Did you mean 'sprites-wan'?"),
        (["generate", "x", "-o", "out.avi"], ".mp4"),
    ],
)
def test_errors_name_the_nearest(words: list[str], nearest: str) -> None:
    assert nearest in cli(*words).stderr


@pytest.mark.parametrize("words", [["--debug", "plan", "show", "balancd"], ["plan", "show", "balancd", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(words: list[str]) -> None:
    result = cli(*words)
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "UnknownName" in result.stderr


# --- methods --------------------------------------------------------------------------------------------------------
def test_methods_as_json_carry_every_option() -> None:
    found = {method["name"]: method for method in answer("methods", "--json")["methods"]}
    assert list(found) == list(TABLE)
    for method in found.values():
        assert method["summary"]
        assert method["layer"]
        for option in method["options"]:
            assert {"name", "type", "default", "low", "high", "step", "choices", "optional", "help"} == option.keys()
            assert option["help"]


@pytest.mark.parametrize("name", TABLE)
def test_one_method_in_words(name: str) -> None:
    (described,) = answer("methods", name, "--json")["methods"]
    shown = cli("methods", name).stdout
    assert name in shown
    for option in described["options"]:
        assert option["name"] in shown


# --- plans ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_a_shown_preset_is_a_plan_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(cli("plan", "show", name).stdout)
    assert answer("plan", "check", str(tmp_path / "p.json"), "--json")["ok"]
    assert answer("plan", "check", name, "--json")["plan"] == answer("plan", "show", str(tmp_path / "p.json"))


def test_a_good_plan_in_words(tmp_path: Path) -> None:
    shown = cli("plan", "check", plan_file(tmp_path, {"use": "kv_downsample", "stride": 3}))
    assert shown.exit_code == 0
    assert "stride=3" in shown.stdout


@pytest.mark.parametrize(
    ("entry", "more", "words"),
    [
        ({"use": "kv_downsampl"}, {}, "Did you mean 'kv_downsample'?"),
        ({"use": "kv_downsample", "strid": 2}, {}, "Did you mean 'stride'?"),
        ({"use": "kv_downsample", "stride": 99}, {}, "allowed: 1 <= int <= 8"),
        ({"use": "kv_downsample"}, {"modell": {}}, "Did you mean 'model'?"),
        ({"stride": 2}, {}, "expected"),
    ],
)
def test_a_bad_plan_says_what_and_what_instead(tmp_path: Path, entry: Any, more: Any, words: str) -> None:
    result = cli("plan", "check", plan_file(tmp_path, entry, **more))
    assert result.exit_code == 3
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    assert "is not a plan file" in cli("plan", "check", str(tmp_path / "plan.json")).stderr


# --- doctor and models ----------------------------------------------------------------------------------------------
def test_doctor_as_json() -> None:
    found = answer("doctor", "--json")
    assert found.keys() == {"system", "versions", "devices", "kernels", "optional", "findings"}
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["capability"]
    assert all(found["versions"][name] for name in ("diffeff", "torch", "diffusers", "av"))
    assert all(entry["usable"] or entry["device"] != "cpu" for entry in found["kernels"])
    assert all(entry["usable"] or entry["reason"] for entry in found["optional"])
    assert all(entry["level"] in ("warning", "note") and entry["cure"] for entry in found["findings"])


def test_doctor_in_words() -> None:
    shown = cli("doctor").stdout
    for text in ("torch", "cpu", "int8_linear", "peft"):
        assert text in shown


def test_traps_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch-fidelity": "0.3", "torchao": "0.20", "cache_dit": "1.0"}
    monkeypatch.setattr(traps_module, "installed", there.get)
    monkeypatch.setattr(traps_module, "available_memory", lambda: 2**30)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {finding.name: finding for finding in traps_module.findings()}
    assert {"torch-fidelity", "torchao-noise", "other-tools", "offline", "low-memory"} <= found.keys()
    assert "1.0 GiB" in found["low-memory"].what
    assert "cache_dit" in found["other-tools"].what


def test_no_trap_is_imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traps_module, "installed", lambda name: None)
    monkeypatch.setattr(traps_module, "available_memory", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    names = {finding.name for finding in traps_module.findings()}
    assert not names & {"torch-fidelity", "torchao-noise", "other-tools", "offline", "low-memory"}


def test_models_lists_every_bundled_model() -> None:
    from diffeff.zoo import bundled

    assert list(answer("models", "--json")["models"]) == list(bundled.NAMES)
    shown = cli("models").stdout
    for name in bundled.NAMES:
        assert name in shown
