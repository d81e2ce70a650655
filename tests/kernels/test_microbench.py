"""The choice between kernels: measured once, remembered in memory and on disk, never fatal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffeff.kernels import microbench
from diffeff.kernels.int8_linear import choose_kernel, dispatch, measure, row_bucket

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFEFF_KERNEL_CACHE", str(tmp_path / "cache"))
    microbench.forget()
    yield tmp_path / "cache"
    microbench.forget()


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def test_measured_once_per_key_then_remembered_in_memory_and_on_disk(folder: Path) -> None:
    a, b = Counting(), Counting()
    first = microbench.timings("op", "1x2", CPU, {"a": a, "b": b})
    calls = a.calls
    assert calls >= 3
    assert set(first) == {"a", "b"}
    assert microbench.timings("op", "1x2", CPU, {"a": a, "b": b}) == first
    microbench.forget()
    assert microbench.timings("op", "1x2", CPU, {"a": a, "b": b}) == first
    assert a.calls == calls
    [file] = folder.iterdir()
    data = json.loads(file.read_text())
    assert torch.__version__ in data["machine"]
    assert data["seconds"]["1x2"] == first


def test_a_new_candidate_is_measured_together_with_the_others() -> None:
    a, b = Counting(), Counting()
    microbench.timings("op", "k", CPU, {"a": a})
    calls = a.calls
    microbench.timings("op", "k", CPU, {"a": a, "b": b})
    assert a.calls > calls
    assert b.calls


def test_a_second_process_adds_to_the_file(folder: Path) -> None:
    microbench.timings("op", "k1", CPU, {"a": Counting()})
    microbench.forget()
    microbench._known[("op", microbench.machine(CPU))] = {"k0": {"a": 1.0}}  # a process that never read the file
    microbench.timings("op", "k2", CPU, {"a": Counting()})
    [file] = folder.iterdir()
    assert set(json.loads(file.read_text())["seconds"]) == {"k0", "k1", "k2"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"machine": "another", "seconds": {"k": {"a": 1}}}', '{"machine": 3}']
)
def test_damaged_or_foreign_files_are_measured_anew(folder: Path, content: str) -> None:
    path = microbench.cache_file("op", microbench.machine(CPU))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    a = Counting()
    microbench.timings("op", "k", CPU, {"a": a})
    assert a.calls
    assert set(json.loads(path.read_text())["seconds"]) == {"k"}


def test_an_unwritable_place_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFEFF_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    a = Counting()
    microbench.timings("op", "k", CPU, {"a": a})
    assert a.calls


def test_off_keeps_nothing_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFEFF_KERNEL_CACHE", "off")
    microbench.timings("op", "k", CPU, {"a": Counting()})
    assert not folder.exists()


def test_the_folder_follows_the_users_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIFFEFF_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert microbench.cache_file("op", "m").is_relative_to(tmp_path / "diffeff" / "kernels")


def test_a_candidate_that_fails_is_never_the_fastest() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel image")

    found = microbench.timings("op", "k", CPU, {"a": Counting(), "broken": broken})
    assert found["broken"] == float("inf")
    assert found["a"] < 1


# --- choose_kernel --------------------------------------------------------------------------------------------------
def test_rows_are_measured_in_powers_of_two_up_to_a_cap() -> None:
    assert [row_bucket(m, CPU) for m in (0, 1, 2, 3, 64, 65, 4096)] == [1, 1, 2, 4, 64, 128, 256]
    assert row_bucket(10**6, torch.device("cuda")) == 4096


def test_the_fastest_of_the_allowed_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"float": 1.0, "int_mm": 2.0, "dequantise": 3.0, "aten_dynamic": 0.5}
    monkeypatch.setattr(dispatch, "timings", lambda op, key, device, candidates: {n: seconds[n] for n in candidates})
    args = (64, 32, 32, torch.float32, CPU)
    assert choose_kernel(*args) == "float"
    assert choose_kernel(*args, among=("dequantise", "int_mm")) == "int_mm"
    assert choose_kernel(*args, among=("aten_dynamic", "float")) == "aten_dynamic"


def test_a_single_candidate_needs_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "timings", None)
    assert choose_kernel(64, 32, 32, torch.float32, CPU, among=("int_mm", "triton")) == "int_mm"


def test_what_cannot_run_here_is_refused() -> None:
    with pytest.raises(RuntimeError, match="triton"):
        choose_kernel(1, 8, 8, torch.float32, CPU, among=("triton",))


def test_nothing_is_measured_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(dispatch, "timings", None)
    assert choose_kernel(64, 32, 32, torch.float32, CPU, among=("dequantise", "int_mm")) == "dequantise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_measurement_leaves_the_random_state_alone(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    found = measure(8, 24, 17, dtype, CPU, ("int_mm", "dequantise", "aten_dynamic"))
    assert set(found) == {"float", "int_mm", "dequantise", "aten_dynamic"}
    assert all(0 < value < 1 for value in found.values())
    assert torch.equal(torch.get_rng_state(), state)
