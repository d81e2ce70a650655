"""The Triton kernel of int8_linear, interpreted in a process of its own (the switch is read at import)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_triton_is_not_imported_by_the_dispatch() -> None:
    program = "import sys, diffeff.kernels.int8_linear; sys.exit('triton' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffeff.kernels.int8_linear import triton as kernels

kinds = dict(q="*i8", w="*i8", sx="*fp32", sw="*fp32", bias="*bf16", y="*bf16", m="i32", n="i32", k="i32")
kinds |= dict.fromkeys(("HAS_BIAS", "BM", "BN", "BK"), "constexpr")
values = {(9,): True, (10,): 128, (11,): 128, (12,): 64}
target, options = GPUTarget("cuda", 90, 32), {"num_warps": 8, "num_stages": 3}
built = triton.compile(ASTSource(kernels._matmul, kinds, values), target=target, options=options)
if "wgmma" not in built.asm["ptx"] or built.metadata.shared > 227 * 1024:
    raise SystemExit("no tensor cores, or too much shared memory")
"""


@pytest.mark.triton
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_compiles_for_a_gpu_and_uses_its_tensor_cores(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
