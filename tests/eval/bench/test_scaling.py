"""Scaling: the points of each axis, what is measured at them, known slopes, and what is refused."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch

from diffeff.errors import ConfigError, DiffEffError, UnknownName
from diffeff.eval.bench import scaling
from diffeff.eval.bench.axes import AXES, Point, subject_of, tokens_of
from diffeff.eval.bench.point import fresh_memory
from diffeff.eval.bench.scaling import UNITS, ScalingSettings, measure_scaling
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.zoo.tiny import FAMILIES, make

FEW = {"tokens": ((4, 6), (8, 12), (12, 18)), "frames": (1, 2, 4), "steps": (1, 2, 4), "batch": (1, 2, 3)}


def rows_of(**settings: Any) -> list[dict[str, Any]]:
    return list(measure_scaling(ScalingSettings(**{"repeats": 1, "memory": "off", **settings})))


def test_rows_of_every_axis() -> None:
    seen: list[tuple[int, int, str]] = []
    settings = ScalingSettings(model="tiny:wan", points=FEW, repeats=2, memory="here")
    rows = list(measure_scaling(settings, lambda *told: seen.append(told)))
    assert [row["axis"] for row in rows] == list(AXES)
    assert [done for done, _, _ in seen] == [*range(len(seen) - 1), seen[-1][1]]
    assert seen[0] == (0, 4 * 3 * (1 + 2 + 1), "tokens 4x6, warm-up")
    for row in rows:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert (row["benchmark"], row["model"], row["unit"]) == ("scaling", "tiny:wan", UNITS[row["axis"]])
        assert row["failed"] == []
        assert [point["value"] for point in row["points"]] == [
            list(v) if row["axis"] == "tokens" else v for v in FEW[row["axis"]]
        ]
        assert all(point["seconds"] > 0 and point["cpu_seconds"] > 0 for point in row["points"])
        slope = row["slope_time"]
        assert slope["low"] <= slope["value"] <= slope["high"]
        assert slope["points"] == 3
        assert row["environment"]["torch"]
    assert [point["x"] for point in rows[0]["points"]] == [18, 72, 162]  # 3 latent frames, patches of 2 x 2
    assert [point["x"] for point in rows[1]["points"]] == [1, 2, 4]
    assert len({row["run"] for row in rows}) == 1
    if rows[0]["points"][0]["peak_bytes"] is not None:  # the system tells
        assert all(point["peak_bytes"] > point["above_load_bytes"] >= 0 for point in rows[0]["points"])


def test_points_take_turns_in_reversed_order() -> None:
    seen: list[str] = []
    settings = ScalingSettings(model="tiny:dit", axes=("steps",), points=FEW | {}, repeats=2, memory="off")
    with pytest.raises(ConfigError, match="no axis 'tokens'"):
        list(measure_scaling(settings))
    settings = ScalingSettings(model="tiny:dit", axes=("steps",), points={"steps": (4, 1, 2)}, repeats=2, memory="off")
    list(measure_scaling(settings, lambda done, total, label: seen.append(label)))
    assert seen[:3] == ["steps 1, warm-up", "steps 2, warm-up", "steps 4, warm-up"]
    assert seen[3:6] == ["steps 1, round 1", "steps 2, round 1", "steps 4, round 1"]
    assert seen[6:9] == ["steps 4, round 2", "steps 2, round 2", "steps 1, round 2"]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_known_slopes_come_out(monkeypatch: pytest.MonkeyPatch, power: float) -> None:
    def timed(axis: Any, point: Point) -> tuple[float, float]:
        x = axis.subject.x(point) or tokens_of(axis.subject.pipe, axis.subject.call(point, 0))
        return 0.5 * x**power, 0.25 * x

    def memory(subject: Any, point: Point, *_: Any) -> dict[str, Any]:
        return {"bytes": 10**6 + 100 * point.value, "above_load_bytes": 100 * point.value**2, "how": "made up"}

    monkeypatch.setattr(scaling._Axis, "_timed", timed)
    monkeypatch.setattr(scaling, "memory_here", memory)
    tokens, frames = rows_of(model="tiny:wan", axes=("tokens", "frames"), memory="off")
    assert tokens["slope_time"]["value"] == pytest.approx(power, abs=1e-3)
    assert tokens["slope_cpu_time"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert tokens["slope_memory"] is None
    assert frames["slope_time"]["value"] == pytest.approx(power, abs=1e-3)
    (steps,) = rows_of(model="tiny:wan", axes=("steps",), memory="here")
    assert steps["slope_memory"]["value"] == pytest.approx(2.0, abs=1e-3)
    assert steps["points"][0]["memory_how"] == "made up"


def test_a_point_that_cannot_run_is_left_out_and_told() -> None:
    points = {"tokens": ((8, 12), (16, 24), (20, 30), (64, 96))}  # the last is beyond SD3's position table
    (row,) = rows_of(model="tiny:sd3", axes=("tokens",), points=points)
    assert [failed["value"] for failed in row["failed"]] == [[64, 96]]
    assert "ValueError" in row["failed"][0]["error"]
    assert row["slope_time"]["points"] == 3
    (row,) = rows_of(model="tiny:sd3", axes=("tokens",), points={"tokens": ((8, 12), (16, 24), (64, 96))})
    assert row["slope_time"] is None
    assert len(row["points"]) == 2


def test_a_plan_is_on_while_it_is_measured_and_refusals_are_told() -> None:
    plan = Plan.from_dict({"diffeff_plan": 1, "methods": [{"use": "feature_cache", "first": 1, "last": 1}]})
    (row,) = rows_of(model="tiny:wan", axes=("steps",), points={"steps": (2, 4, 6, 8)}, plan=plan)
    assert row["plan"] == plan.to_dict()
    assert [point["value"] for point in row["points"]] == [4, 6, 8]
    assert [failed["value"] for failed in row["failed"]] == [2]  # every step protected
    assert "feature_cache" in row["failed"][0]["error"]


def test_a_loaded_pipeline_gets_its_plan_back() -> None:
    pipe = DiffEffPipeline.from_pretrained("digits-dit", plan="balanced")
    settings = ScalingSettings(model="digits-dit", points={"batch": (1, 2, 3)}, axes=("batch",), repeats=1,
                               memory="off", call={"num_inference_steps": 6})  # fmt: skip
    (row,) = measure_scaling(settings, pipe=pipe)
    assert [point["x"] for point in row["points"]] == [1, 2, 3]
    assert row["plan"] is None
    assert row["dtype"] == "float32"
    assert pipe.plan == Plan.preset("balanced")


def test_axes_and_calls_of_a_bundled_model() -> None:
    subject = subject_of("sprites-wan", {"guidance_scale": 1.0})
    assert subject.axes() == AXES
    for axis in AXES:
        values = subject.defaults(axis)
        assert len(set(values)) >= 3
        x = [subject.x(Point(axis, value)) for value in values]
        assert x == [None] * len(values) if axis == "tokens" else x == sorted(x)  # type: ignore[type-var]
    call = subject.call(Point("frames", 17), seed=1)
    assert (call["num_frames"], call["guidance_scale"], call["output_type"]) == (17, 1.0, "latent")
    assert len(subject.call(Point("batch", 3), 0)["prompt"]) == 3
    assert subject.call(Point("tokens", (32, 48)), 0)["width"] == 48
    assert tokens_of(subject.pipe, subject.call(Point("tokens", (64, 64)), 0)) == 80  # 5 frames of 4 x 4
    assert subject.x(Point("frames", 9)) == 5


@pytest.mark.parametrize("model", ["tiny:wan", "digits-dit"])
def test_a_fixed_argument_gives_way_on_its_own_axis(model: str) -> None:
    subject = subject_of(model, {"num_inference_steps": 3})
    assert subject.call(Point("steps", 7), 0)["num_inference_steps"] == 7
    assert subject.call(Point("batch", 2), 0)["num_inference_steps"] == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_grow_with_the_area(name: str) -> None:
    if not FAMILIES[name].resizable:
        pytest.skip("one size only")
    subject = subject_of(f"tiny:{name}", {})
    small, large = (tokens_of(subject.pipe, subject.call(Point("tokens", v), 0)) for v in ((4, 8), (8, 16)))
    assert large == 4 * small
    assert not subject.pipe.denoisers[0].module._forward_pre_hooks


def test_a_pipeline_of_ones_own_needs_a_start() -> None:
    subject = subject_of("my-model", {}, pipe=make("sd"))
    with pytest.raises(ConfigError, match="give height and width"):
        subject.defaults("tokens")
    with pytest.raises(ConfigError, match="takes no 'num_frames'"):
        subject_of("my-model", {"num_frames": 9}, pipe=make("sd"))


def test_inputs_of_ones_own_stay_out_of_the_row() -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "prompt_embeds": torch.zeros(1, 7, 16),
            "negative_prompt_embeds": torch.zeros(1, 7, 16)}  # fmt: skip
    settings = ScalingSettings(model="my-model", call=call, repeats=1)
    tokens, steps = measure_scaling(settings, pipe=make("sd"))
    assert (tokens["axis"], steps["axis"]) == ("tokens", "steps")  # embeddings fix the batch
    assert [point["x"] for point in tokens["points"]] == [64, 144, 256, 576]
    assert [point["x"] for point in steps["points"]] == [1, 2, 3, 4]
    assert tokens["call"]["prompt_embeds"] == "Tensor"
    assert json.loads(json.dumps(tokens, allow_nan=False)) == tokens
    assert tokens["points"][0]["memory_how"].endswith("in this process")


@pytest.mark.slow
def test_memory_in_a_fresh_process() -> None:
    request = {"model": "tiny:wan", "call": {}, "device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    found = fresh_memory(request | {"plan": None, "folder": None, "axis": "batch", "value": 8})
    assert found["how"].endswith("in a fresh process")
    if found["bytes"] is not None:
        assert found["bytes"] > 10 * 2**20 > found["above_load_bytes"] > 0


def test_a_failing_process_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["a line\nRuntimeError: not enough memory\n", ""]

    def die(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -9, "", said.pop(0))

    monkeypatch.setattr(subprocess, "run", die)
    request = {"model": "big", "axis": "batch", "value": 64}
    for told in ("RuntimeError: not enough memory", "it ended with code -9"):
        with pytest.raises(DiffEffError, match=f"memory of big at batch 64: {told}"):
            fresh_memory(request)


@pytest.mark.parametrize(
    ("settings", "error", "why"),
    [
        ({"axes": ("token",)}, UnknownName, "Did you mean 'tokens'"),
        ({"points": {"width": (1, 2, 3)}}, UnknownName, "no axis 'width'"),
        ({"points": {"steps": (4, 8)}}, ConfigError, "at least 3 different"),
        ({"points": {"steps": (4, 4, 8)}}, ConfigError, "at least 3 different"),
        ({"points": {"steps": (0, 4, 8)}}, ConfigError, "an integer above 0"),
        ({"points": {"steps": (1.5, 4, 8)}}, ConfigError, "an integer above 0"),
        ({"points": {"tokens": ([32, 32], [64, 64], [96, 96])}}, ConfigError, r"\(height, width\)"),
        ({"points": {"tokens": (32, 64, 96)}}, ConfigError, r"\(height, width\)"),
        ({"points": {"tokens": ((32, 0), (64, 64), (96, 96))}}, ConfigError, r"\(height, width\)"),
        ({"repeats": 0}, ConfigError, "repeats is 0"),
        ({"memory": "maybe"}, ConfigError, "fresh, here, off"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        ScalingSettings(**settings)
