"""The cases of all Triton kernels: interpreted on the CPU in a process of its own, and as they are on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("*.py"))
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run_cases(**switches: str) -> None:
    path = os.pathsep.join([p for p in sys.path if p])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | switches
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, CASES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.triton
@pytest.mark.slow
@needs_triton
def test_interpreted() -> None:
    """Triton reads the switch when it is imported, hence the process of its own."""
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.triton
@needs_triton
def test_on_the_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")
