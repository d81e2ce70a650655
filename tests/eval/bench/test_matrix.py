"""The matrix of methods and families: every status, with its reason, from real and from broken methods."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config
from diffeff.core.method import Layer, Method
from diffeff.core.run import Run
from diffeff.errors import ConfigError, MethodInapplicable, UnknownName
from diffeff.eval.bench import matrix
from diffeff.eval.bench.matrix import STATUSES, MatrixSettings, columns, measure_matrix
from diffeff.methods import table
from diffeff.plan import Plan


def rows_of(**settings: Any) -> list[dict[str, Any]]:
    return list(measure_matrix(MatrixSettings(**settings)))


def test_every_method_has_a_column_and_every_site_too() -> None:
    assert set(table.TABLE) <= set(columns())
    assert columns()["feature_cache:segment"].methods[0].to_dict()["site"] == "segment"
    for plan in columns().values():
        assert Plan.from_dict(plan.to_dict()) == plan


def test_rows_of_one_family() -> None:
    seen: list[tuple[int, int, str]] = []
    names = ("feature_cache", "feature_cache:segment", "guidance_skip", "kv_downsample", "int8_weights")
    settings = MatrixSettings(families=("wan",), methods=names)
    rows = list(measure_matrix(settings, lambda *told: seen.append(told)))
    assert [row["method"] for row in rows] == list(names)
    assert [done for done, _, _ in seen] == [*range(len(rows)), len(rows)]
    assert seen[0][1:] == (len(rows), "feature_cache on wan")
    for row in rows:
        assert json.loads(json.dumps(row)) == row
        assert (row["benchmark"], row["family"], row["pipeline"]) == ("matrix", "wan", "WanPipeline")
        assert row["status"] == "works"
        assert row["reason"]
        assert 0 < row["relative_difference"] < 0.5
        assert row["environment"]["diffusers"]
        assert row["plan"]["methods"][0]["use"] == row["method"].split(":")[0]
    assert len({row["run"] for row in rows}) == 1
    left = {row["method"]: row["compute_left"] for row in rows}
    assert left["feature_cache"] == 5 / 8  # 3 of 8 steps predicted
    assert left["feature_cache"] < left["feature_cache:segment"] < 1
    assert left["guidance_skip"] == 1 - 3 / 16  # one branch of two, at 3 of 8 steps
    assert left["kv_downsample"] < 1
    assert left["int8_weights"] == pytest.approx(1, abs=0.001)  # int8 products are products


def test_idle_and_refused() -> None:
    (idle,) = rows_of(families=("flux",), methods=("guidance_skip",))
    assert (idle["status"], idle["compute_left"], idle["max_abs"]) == ("idle", 1.0, 0.0)
    assert "distilled" in idle["reason"]
    rows = rows_of(families=("dit",), methods=("feature_cache", "feature_cache:segment"), pairs=True)
    assert [row["status"] for row in rows] == ["works", "works", "refused"]
    assert rows[2]["method"] == "feature_cache + feature_cache:segment"
    assert (rows[2]["phase"], rows[2]["compute_left"]) == ("apply", None)
    assert "feature_cache and feature_cache" in rows[2]["reason"]
    (late,) = rows_of(families=("dit",), methods=("feature_cache",), steps=2)  # every step is protected
    assert (late["status"], late["phase"]) == ("refused", "run")


@dataclass(frozen=True, kw_only=True)
class Broken(Config):
    """Does one wrong thing."""

    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "Wrong."
    wrong: ClassVar[str] = ""

    def build(self) -> BrokenMethod:
        return BrokenMethod(self)


class BrokenMethod(Method[Broken]):
    layer: ClassVar[Layer] = Layer.STEP

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if Broken.wrong == "inapplicable":
            raise MethodInapplicable("broken finds nothing here")

    def around_step(self, run: Run, call: Any, proceed: Any) -> Any:
        result = proceed(call)
        if Broken.wrong == "raises":
            raise ZeroDivisionError("in the middle")
        if Broken.wrong == "trace":
            run.call.denoiser.module.proj_out.bias.data.add_(1.0)  # type: ignore[union-attr]
        return result

    def engaged(self, run: Run) -> tuple[bool, str]:
        return Broken.wrong != "idle", f"wrong: {Broken.wrong}"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("broken_method")
    module.Broken = Broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_method", module)
    monkeypatch.setitem(table.TABLE, "broken", "broken_method:Broken")
    columns.cache_clear()
    yield
    columns.cache_clear()


@pytest.mark.parametrize(
    ("wrong", "status", "phase", "reason"),
    [
        ("", "idle", None, "bit for bit"),
        ("idle", "idle", None, "wrong: idle"),
        ("inapplicable", "refused", "apply", "finds nothing"),
        ("raises", "fails", "run", "ZeroDivisionError: in the middle"),
        ("trace", "fails", "remove", "another result after the plan was removed"),
    ],
)
def test_what_a_broken_method_does(
    broken: None, monkeypatch: pytest.MonkeyPatch, wrong: str, status: str, phase: str | None, reason: str
) -> None:
    monkeypatch.setattr(Broken, "wrong", wrong)
    first, second = rows_of(families=("wan",), methods=("broken", "feature_cache"), steps=4)
    assert (first["status"], first["phase"]) == (status, phase)
    assert status in STATUSES
    assert reason in first["reason"]
    assert second["status"] == "works"  # the pipeline is made anew after a failure


def test_a_family_that_cannot_be_built_fails_in_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, seed: int) -> Any:
        raise TypeError("this diffusers knows no such argument")

    monkeypatch.setattr(matrix, "make", refuse)
    rows = rows_of(families=("wan", "sd"), methods=("feature_cache",))
    assert [(row["status"], row["phase"], row["pipeline"]) for row in rows] == [("fails", "build", None)] * 2
    assert "TypeError" in rows[0]["reason"]


def test_a_result_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = matrix.run

    def spoilt(name: str, pipe: Any, **options: Any) -> Tensor:
        found = real(name, pipe, **options)
        return found / 0 if pipe.plan.methods else found

    monkeypatch.setattr(matrix, "run", spoilt)
    (row,) = rows_of(families=("dit",), methods=("feature_cache",))
    assert (row["status"], row["phase"]) == ("fails", "run")
    assert "not finite" in row["reason"]
    assert torch.isfinite(torch.tensor(row["steps"]))


def test_settings_are_checked() -> None:
    with pytest.raises(UnknownName, match="wan-2expert"):
        MatrixSettings(families=("wan-2experts",))
    with pytest.raises(UnknownName, match="feature_cache"):
        MatrixSettings(methods=("feature_cash",))
    with pytest.raises(ConfigError, match="steps is 0"):
        MatrixSettings(steps=0)
