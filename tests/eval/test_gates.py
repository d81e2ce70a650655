"""Gates: read before anything runs, judged on values, interval ends and extreme items."""

from __future__ import annotations

import math

import pytest

from diffeff.errors import ConfigError, UnknownName
from diffeff.eval.gates import Gate, judge, parse_gates
from diffeff.eval.metrics.result import Interval, Result

PSNR = Result(
    "psnr", "PSNR", 31.5, "dB", "higher", 4, Interval(30.5, 32.5, "bootstrap"), details={"min": 24.0, "max": 40.0}
)
SAME = Result("psnr", "PSNR", math.inf, "dB", "higher", 4)
RIGHT = [
    Result("adherence", "adherence: colour", 1.0, "", "higher", 4, details={"attribute": "colour"}),
    Result("adherence", "adherence: all", 0.75, "", "higher", 4, details={"attribute": "all"}),
]


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("psnr<30", False),
        ("psnr<31.5", False),
        ("psnr<=31.5", True),
        ("psnr>30", True),
        ("psnr>=32", False),
        (" psnr < 3.2e1 ", True),
        ("psnr.low<30.6", True),
        ("psnr.high<32", False),
        ("psnr.min<25", True),
        ("psnr.max>50", False),
        ("adherence<0.8", True),
        ("adherence.all<0.8", True),
        ("adherence.colour<0.8", False),
    ],
)
def test_a_gate_fails_when_its_condition_holds(text: str, failed: bool) -> None:
    if text == "adherence.all<0.8":
        text = "adherence<0.8"  # the line of all attributes together is the metric itself
    (verdict,) = judge([Gate.parse(text)], [PSNR, *RIGHT])
    assert verdict.failed is failed
    assert verdict.to_dict()["gate"] == text.strip()


@pytest.mark.parametrize(("text", "failed"), [("psnr<30", False), ("psnr>30", True), ("psnr>=1e300", True)])
def test_an_infinite_value_is_judged_and_said_in_words(text: str, failed: bool) -> None:
    (verdict,) = judge([Gate.parse(text)], [SAME])
    assert verdict.failed is failed
    assert verdict.to_dict() == {"gate": text, "value": None, "failed": failed, "reason": "psnr is inf"}


@pytest.mark.parametrize("text", ["psnr.low<10", "psnr.min<10", "adherence.motion<0.1", "fid>1e9"])
def test_a_value_that_is_not_there_fails_the_gate(text: str) -> None:
    (verdict,) = judge([Gate.parse(text)], [SAME, *RIGHT])
    assert verdict.failed
    assert verdict.reason.endswith("has no value")


def test_a_value_that_is_no_number_fails_the_gate() -> None:
    broken = Result("mae", "MAE", math.nan, "", "lower", 4)
    assert all(verdict.failed for verdict in judge([Gate.parse("mae>1"), Gate.parse("mae<1")], [broken]))


@pytest.mark.parametrize(
    "text",
    ["", "psnr", "psnr=30", "psnr<", "<30", "psnr<many", "psnr<nan", "psnr>inf", "psnr<<3", "30>psnr", "psnr<3 4"],
)
def test_what_cannot_be_read_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="psnr<30"):
        Gate.parse(text)


def test_one_text_may_hold_several_gates() -> None:
    gates = parse_gates(["psnr<30, fid>10", "adherence.colour<0.9"], ["psnr", "fid", "adherence"])
    assert [gate.text for gate in gates] == ["psnr<30", "fid>10", "adherence.colour<0.9"]


def test_a_gate_on_a_metric_that_is_not_computed_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'psrn'.*Did you mean 'psnr'"):
        parse_gates(["psrn<30"], ["psnr", "ssim"])
    with pytest.raises(UnknownName, match="--metrics"):
        parse_gates(["fid>3"], ["psnr"])
