"""Flags made from configs: every kind of option, laid over a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from diffeff.cli.flags import command, flagged_plan
from diffeff.cli.group import alone
from diffeff.core.config import Config, knob
from diffeff.errors import ConfigError
from diffeff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Toy(Config):
    name: ClassVar[str] = "toy_method"
    summary: ClassVar[str] = "A method with every kind of option."

    count: int = knob(2, "how many [of them]", low=1, high=8, step=1)
    share: float = knob(0.5, "how much", low=0.0, high=1.0)
    sharp: bool = knob(True, "whether sharp")
    mode: Literal["slow", "quick"] = knob("slow", "which way")
    limit: float | None = knob(None, "a bound", low=0.0)
    target: int | None = knob(30, "a target that can be unset", low=1)
    blocks: tuple[int, ...] = knob((), "which blocks", low=0)
    max_steps: int = knob(9, "longest run")


@dataclass(frozen=True)
class Ask:
    prompt: Annotated[str, typer.Argument()]
    steps: Annotated[int | None, typer.Option("--steps")] = None


METHODS: dict[str, type[Config]] = {"toy_method": Toy}


def given(*words: str) -> tuple[Ask, dict[str, Any]]:
    """The request and the flags of a command line."""
    caught: list[tuple[Ask, dict[str, Any]]] = []
    app = alone(command(Ask, lambda request, flags: caught.append((request, flags)), METHODS), "Help.")
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return caught[0]


def plan_of(*words: str, base: Plan | None = None) -> Plan:
    return flagged_plan(base or Plan(), given("x", *words)[1], METHODS)


def test_the_request_is_filled_and_flags_left_out_are_absent() -> None:
    assert given("hello", "--steps", "7") == (Ask("hello", 7), {})


def test_a_switch_adds_the_method_with_its_defaults() -> None:
    assert plan_of("--toy-method").methods == (Toy(),)


def test_an_option_switches_the_method_on() -> None:
    words = [
        "--toy-method.count",
        "5",
        "--toy-method.share",
        "0.25",
        "--toy-method.sharp",
        "off",
        "--toy-method.mode",
        "quick",
    ]
    words += ["--toy-method.limit", "2.5", "--toy-method.blocks", "0,3,11", "--toy-method.max-steps", "4"]
    expected = Toy(count=5, share=0.25, sharp=False, mode="quick", limit=2.5, blocks=(0, 3, 11), max_steps=4)
    assert plan_of(*words).methods == (expected,)


def test_an_option_can_be_unset() -> None:
    assert plan_of("--toy-method.target", "none").methods == (Toy(target=None),)
    assert plan_of("--toy-method.target", "12").methods == (Toy(target=12),)


def test_flags_are_laid_over_a_plan() -> None:
    base = Plan([Toy(count=7, mode="quick")])
    assert plan_of("--toy-method.share", "1", base=base).methods == (Toy(count=7, mode="quick", share=1.0),)
    assert plan_of("--toy-method", base=base) == base
    assert plan_of("--no-toy-method", base=base).methods == ()
    assert plan_of(base=base) == base


def test_off_and_an_option_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        plan_of("--no-toy-method", "--toy-method.count", "3")
    with pytest.raises(ConfigError, match="exclude each other"):
        plan_of("--no-toy-method", "--toy-method")


def test_a_value_out_of_range_names_field_and_range() -> None:
    with pytest.raises(ConfigError, match=r"toy_method\.count is 99; allowed: 1 <= int <= 8"):
        plan_of("--toy-method.count", "99")


@pytest.mark.parametrize("words", [("--toy-method.count", "many"), ("--toy-method.mode", "fast"), ("--toy-methd",)])
def test_what_cannot_be_read_is_a_usage_error(words: tuple[str, ...]) -> None:
    app = alone(command(Ask, lambda request, flags: None, METHODS), "Help.")
    assert CliRunner().invoke(app, ["x", *words]).exit_code == 2


def test_help_shows_a_panel_with_ranges_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERMINAL_WIDTH", "160")
    app = alone(command(Ask, lambda request, flags: None, METHODS), "Help.")
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for text in (
        "toy_method: A method with every kind",
        "--toy-method.count",
        "1 <= int <= 8; default 2",
        "how many [of them]",
    ):
        assert text in shown
    assert "default 30, or none" in shown
    assert "slow" in shown
    assert "quick" in shown
