"""The Triton kernel of int8_linear, run by Triton's interpreter in a process of its own (the switch is read at import)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROGRAM = """
import torch
from diffeff.kernels.int8_linear import quantise_weight, reference
from diffeff.kernels.int8_linear.triton import int8_linear_triton

torch.manual_seed(0)
for m, k, n in ((1, 8, 8), (3, 63, 65), (33, 100, 60), (128, 64, 128)):
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        for bias in (None, torch.randn(n).to(dtype)):
            x, (q, s) = torch.randn(m, k).to(dtype), quantise_weight(torch.randn(n, k) / k**0.5)
            y, exact = int8_linear_triton(x, q, s, bias), reference(x, q, s, bias)
            error = ((y.double() - exact.double()).norm() / exact.double().norm()).item()
            if y.dtype is not dtype or not error < bound:
                raise SystemExit(f"{m}x{k}x{n} {dtype}: {error}")
x, (q, s) = torch.randn(3, 8), quantise_weight(torch.randn(8, 8))
x[1, 2], x[2, 5] = float("nan"), float("inf")
y = int8_linear_triton(x, q, s)
if not y[0].isfinite().all() or y[1:].isfinite().any():
    raise SystemExit("bad numbers are hidden")
if int8_linear_triton(x[:0], q, s).shape != (0, 8):
    raise SystemExit("no rows")
"""


@pytest.mark.triton
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_kernel_equals_the_reference() -> None:
    path = os.pathsep.join([p for p in sys.path if p])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr


def test_triton_is_not_imported_by_the_dispatch() -> None:
    program = "import sys, diffeff.kernels.int8_linear; sys.exit('triton' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0  # noqa: S603
