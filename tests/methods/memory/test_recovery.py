"""When memory runs out all the same: the stage is named, one step further down the result is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiny
import torch

from diffeff import DiffEffPipeline
from diffeff.core.run import Clock, Run
from diffeff.errors import ModelLoadError
from diffeff.methods.memory.feature_slicing import FeatureSlicing
from diffeff.methods.memory.ladder import Rung
from diffeff.methods.memory.planner import MemoryGoal, MemoryPlan, Step
from diffeff.methods.memory.recovery import MemoryKeeper, out_of_memory, stage_of

CPU = "[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def failing(times: int, error: Callable[[], BaseException]) -> Callable[..., None]:
    """A pre-hook that fails so often, then lets calls pass."""
    left = [times]

    def fail(*_: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise error()

    return fail


def kept(retries: int = 2) -> DiffEffPipeline:
    """A pipeline under a generous budget, planned already."""
    pipe = DiffEffPipeline(tiny.make("sd")).apply(memory=MemoryGoal(memory="20GB", retries=retries))
    pipe(**call(pipe))
    return pipe


def call(pipe: DiffEffPipeline) -> dict[str, Any]:
    return tiny.call_kwargs("sd", pipe, steps=2)


def in_a_block(pipe: DiffEffPipeline, hook: Callable[..., None]) -> Any:
    return pipe.wrapped.unet.conv_norm_out.register_forward_pre_hook(hook)


# --- signs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(CPU),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_signs_of_memory_running_out(error: BaseException) -> None:
    assert out_of_memory(error)
    wrapped = ModelLoadError("could not go on")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped)


@pytest.mark.parametrize("error", [None, RuntimeError("mat1 and mat2 shapes differ"), ValueError("out of memory")])
def test_other_errors_are_none(error: BaseException | None) -> None:
    assert not out_of_memory(error)


def test_stage_by_the_clock() -> None:
    run = Run("x", True)
    assert stage_of(None) == stage_of(run) == "text"
    run.first_call = 1.0
    run.clock = Clock(index=1, total=4, updates=1)
    assert stage_of(run) == "denoise"
    run.clock = Clock(index=4, total=4, updates=4)
    assert stage_of(run) == "decode"


# --- injected failures ----------------------------------------------------------------------------------------------
def test_a_failed_call_is_run_again_and_gives_the_same() -> None:
    pipe = kept()
    expected = pipe(**call(pipe)).images
    in_a_block(pipe, failing(1, lambda: RuntimeError(CPU)))
    found = pipe(**call(pipe)).images
    assert torch.allclose(found, expected, atol=1e-5)
    assert pipe.report is not None
    (note,) = (w for w in pipe.report.warnings if "out of memory" in w)
    assert "in the stage denoise" in note
    assert "feature slicing" in note
    assert pipe.plan.methods == ()  # as planned again


def test_retries_are_limited_and_the_planned_step_comes_back() -> None:
    pipe = kept(retries=1)
    hook = in_a_block(pipe, failing(5, lambda: torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        pipe(**call(pipe))
    assert pipe.plan.methods == ()
    hook.remove()
    assert pipe(**call(pipe)).images is not None


def test_without_retries_and_for_other_errors_nothing_is_tried_again() -> None:
    for retries, error in ((0, RuntimeError(CPU)), (2, RuntimeError("something else"))):
        pipe = kept(retries)
        runs: list[int] = []
        in_a_block(pipe, lambda *_, runs=runs: runs.append(1))
        in_a_block(pipe, failing(1, lambda error=error: error))
        with pytest.raises(RuntimeError, match=str(error)[:14].replace("[", ".")):
            pipe(**call(pipe))
        assert len(runs) == 1


class Scripted:
    """A host whose first runs fail; says what it was asked for."""

    def __init__(self, fails: int) -> None:
        self.fails, self.rungs, self.drawn = fails, [], []  # type: ignore[var-annotated]

    def _planned(self, goal: MemoryGoal, call: Mapping[str, Any]) -> MemoryPlan:
        further = (Rung("second", (FeatureSlicing(),)), Rung("third", ()), Rung("fourth", ()))
        return MemoryPlan(1, (Step(Rung("first", ()), None, 1.0),), further)

    def _adopt(self, rung: Rung) -> None:
        self.rungs.append(rung.name)

    def _run(self, call: Mapping[str, Any]) -> str:
        self.drawn.append(float(torch.rand(1, generator=call["generator"])))
        if len(self.drawn) <= self.fails:
            raise MemoryError
        return "done"

    def _last_run(self) -> Run | None:
        return None


def test_every_try_starts_from_the_same_random_state() -> None:
    host = Scripted(fails=2)
    result, notes = MemoryKeeper(MemoryGoal(retries=2)).call(host, {"generator": torch.Generator().manual_seed(3)})
    assert result == "done"
    assert host.rungs == ["first", "second", "third", "first"]
    assert len(set(host.drawn)) == 1
    assert len(host.drawn) == 3
    assert ["second" in notes[0], "third" in notes[1]] == [True, True]


def test_the_last_error_comes_out_when_retries_are_used_up() -> None:
    host = Scripted(fails=9)
    with pytest.raises(MemoryError):
        MemoryKeeper(MemoryGoal(retries=1)).call(host, {"generator": torch.Generator()})
    assert host.rungs == ["first", "second", "first"]


# --- a real failure -------------------------------------------------------------------------------------------------
REAL = """
import json, resource, sys
import tiny, torch
from diffeff import DiffEffPipeline
from diffeff.methods.memory.planner import MemoryGoal
torch.set_num_threads(1)
pipe = DiffEffPipeline(tiny.make("sd")).apply(memory=MemoryGoal(memory="20GB"))
pipe(**tiny.call_kwargs("sd", pipe, steps=1))
hungry = lambda *_: torch.ones(1 << 31) if not pipe.plan.methods else None
pipe.wrapped.unet.conv_norm_out.register_forward_pre_hook(hungry)
room = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (room + (1 << 30),) * 2)
pipe(**tiny.call_kwargs("sd", pipe, steps=1))
print(json.dumps(list(pipe.report.warnings)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space hold on Linux only")
def test_a_real_failure_of_the_cpu_allocator(request: pytest.FixtureRequest) -> None:
    support = str(request.config.rootpath / "tests" / "support")
    code = f"import sys; sys.path.insert(0, {support!r})\n{REAL}"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any("out of memory in the stage denoise" in w for w in json.loads(done.stdout.splitlines()[-1]))
