"""The benchmark of kernels: every case runs on the CPU, its rows say what ran, and wrong names are refused."""

from __future__ import annotations

import json

import pytest
import torch

from diffeff.errors import UnknownName
from diffeff.eval.bench import kernels as bench
from diffeff.eval.bench.kernel_cases import CASES, OURS, Case
from diffeff.eval.bench.kernels import Ceilings, KernelSettings, measure_kernels


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_ceilings", lambda place: Ceilings(1e10, 1e11))
    monkeypatch.setattr(bench, "_SAMPLE", 0.0)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_and_its_arms_agree(name: str) -> None:
    rows = list(measure_kernels(KernelSettings(kernels=(name,), rounds=1)))
    assert {row["status"] for row in rows} == {"ok"}
    assert any(row["path"] == "reference" for row in rows)
    for row in rows:
        assert row["difference"] < (5e-2 if not row["exact"] else 1e-4), row
        assert row["milliseconds"]["median"] > 0
        assert json.loads(json.dumps(row)) == row


def test_copies_are_counted_inside_our_operations_too() -> None:
    rows = {row["arm"]: row for row in measure_kernels(KernelSettings(kernels=("temporal_attention",), rounds=1))}
    # three operands and the result are moved for SDPA; the reference writes its slice into the result
    assert rows["sdpa"]["copies"] == 4
    assert rows[OURS]["copies"] == 1


def test_an_arm_that_cannot_run_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no such backend\nand more")

    case = Case("k", "1", 4, 4, {OURS: lambda: torch.ones(1), "other": broken}, "other")
    monkeypatch.setattr(bench, "CASES", {"k": lambda place: iter([case])})
    rows = list(measure_kernels(KernelSettings(kernels=("k",), rounds=1)))
    assert [row["status"] for row in rows] == ["ok", "unavailable"]
    assert rows[1]["reason"] == "no such backend"
    assert rows[0]["ratio"] is None


def test_unknown_kernels_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="predict"):
        KernelSettings(kernels=("predct",))
