"""The comparison's protocol, on a pipeline that only pretends: order, ratios, fewer steps, cleaning up."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffeff.core.config import Config
from diffeff.eval.compare import compare, fewer_steps
from diffeff.plan import Plan


class Pretender:
    """A pipeline whose steps take a millisecond each, a third of that with a plan on."""

    def __init__(self) -> None:
        self.plan = Plan()
        self.calls: list[str] = []
        self.report: Any = SimpleNamespace(
            seconds={"encode": 0.0, "decode": 0.0},
            to_dict=lambda: {"steps": 1},
            to_markdown=lambda: "report",
            methods=(),
        )

    def apply(self, plan: Plan) -> Pretender:
        self.plan = plan
        return self

    def remove(self) -> Pretender:
        return self.apply(Plan())


class Quick(Config):
    """Stands for any method."""

    name = "quick"


PLAN = Plan([Quick()])


def generate(pipe: Any, steps: int, name: str) -> np.ndarray[Any, Any]:
    pipe.calls.append(name)
    fast = bool(pipe.plan.methods)
    time.sleep(steps * (0.001 if fast else 0.003))
    frames = np.full((2, 8, 8, 3), 0.5, dtype=np.float32)
    return frames + (0.1 if fast else 0) + (0.02 * (9 - steps) / 9)


def test_arms_take_turns_and_the_order_is_reversed_every_other_round() -> None:
    pipe: Any = Pretender()
    seen: list[str] = []
    result = compare(pipe, PLAN, generate, 9, rounds=2, observe=lambda name, frames: seen.append(name))
    arms = ["plain", "accelerated", "fewer"]
    warm_up = ["plain", "accelerated", "plain", "accelerated", "fewer"]
    assert pipe.calls == [*warm_up, *arms, *reversed(arms)]
    assert seen == arms
    assert result.accelerated.speedup.low > 1.5
    assert result.plain.speedup.median == 1
    assert result.fewer is not None
    assert 2 <= result.fewer.steps <= 5
    assert pipe.plan == Plan()


def test_a_closer_run_with_fewer_steps_is_said_out_loud() -> None:
    result = compare(Pretender(), PLAN, generate, 9, rounds=1)  # type: ignore[arg-type]
    assert any("fewer steps are the better choice" in note for note in result.notes)
    assert any("not measurable" in note for note in result.notes)


def test_the_record_is_json_and_the_page_has_a_row_per_arm() -> None:
    result = compare(Pretender(), PLAN, generate, 9, rounds=1)  # type: ignore[arg-type]
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [arm["name"] for arm in record["arms"]] == ["plain", "accelerated", "fewer"]
    assert record["arms"][0]["identical"]
    assert record["arms"][0]["psnr"] is None
    assert record["arms"][1]["psnr"] == pytest.approx(20, abs=0.01)
    page = result.to_markdown()
    assert page.count("\n|") == 4
    assert "not a benchmark" in page


def test_the_pipeline_gets_its_plan_back_when_interrupted() -> None:
    pipe: Any = Pretender()
    pipe.plan = PLAN

    def stop(pipe: Any, steps: int, name: str) -> np.ndarray[Any, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pipe, Plan(), stop, 9)
    assert pipe.plan is PLAN


def test_rounds_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds >= 1"):
        compare(Pretender(), PLAN, generate, 9, rounds=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "plain", "accelerated", "fixed", "expected"),
    [(30, 10.0, 5.0, 0.0, 15), (30, 11.0, 6.0, 1.0, 15), (30, 10.0, 9.95, 0.0, None), (4, 10.0, 0.1, 0.0, 1)],
)
def test_steps_of_the_same_cost(
    steps: int, plain: float, accelerated: float, fixed: float, expected: int | None
) -> None:
    assert fewer_steps(steps, plain, accelerated, fixed) == expected
