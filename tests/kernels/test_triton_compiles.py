"""Every Triton kernel compiles for the GPUs it is meant for, as its launcher would launch it at real widths."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from offline import build, launches
from diffeff.kernels.group_norm.triton import group_norm_triton
from diffeff.kernels.int8_attention.triton import int8_attention_triton
from diffeff.kernels.predict.triton import predict_triton
from diffeff.kernels.sliced_attention import BlockList, Extras
from diffeff.kernels.sliced_attention.triton import sliced_attention_triton
from diffeff.kernels.temporal_attention.triton import temporal_attention_triton
from diffeff.kernels.token_match import token_groups
from diffeff.kernels.token_match.triton import match_triton, merge_triton

target = int(sys.argv[1])


def tokens(d, dtype=torch.bfloat16, heads=2, n=256):
    return torch.empty(1, n, heads, d, dtype=dtype).transpose(1, 2)


def frames(t, d, dtype):
    return torch.empty(1, t, 4, 8, d, dtype=dtype)


def temporal(t, d, dtype, lam=None):
    x = frames(t, d, dtype)
    bias = torch.empty(8, t, t) if lam is not None else None
    return lambda: temporal_attention_triton(x, x, x, bias, lam, 0.1)


def sliced(d, dtype=torch.bfloat16, **extras):
    x = tokens(d, dtype)
    return lambda: sliced_attention_triton(x, x, x, Extras(**extras), 0.1)


index, size = torch.zeros(256, dtype=torch.int32), torch.zeros(256)
blocks = BlockList.of(torch.ones(2, 4, dtype=torch.bool), 128, 64)
x, image = torch.empty(2, 300, 320, dtype=torch.float16), torch.empty(2, 320, 32, 32, dtype=torch.float16)
groups = token_groups(torch.zeros(2, 300, dtype=torch.int64), 200)
calls = {  # launch, whether tensor cores must be in use
    "temporal 16x40": (temporal(16, 40, torch.float16, torch.ones(8)), True),
    "temporal 32x160": (temporal(32, 160, torch.bfloat16), True),
    "temporal 24x80 float32": (temporal(24, 80, torch.float32), False),
    "sliced 40 gathered": (sliced(40, key_index=index, key_logsize=size), True),
    "sliced 128 bias": (sliced(128, bias=torch.empty(1, 2, 256, 256, dtype=torch.bfloat16)), True),
    "sliced 64 listed": (sliced(64, blocks=blocks), True),
    "sliced 160 masked": (sliced(160, bias=torch.empty(256, 256, dtype=torch.bool)), True),
    "sliced 64 float32": (sliced(64, torch.float32), False),
    "int8 64": (lambda: int8_attention_triton(tokens(64), tokens(64), tokens(64), 0.1, True), True),
    "int8 128": (lambda: int8_attention_triton(tokens(128), tokens(128), tokens(128), 0.1, True), True),
    "match": (lambda: match_triton(x, x, "cosine"), True),
    "merge": (lambda: merge_triton(x, groups), False),
    "group norm": (lambda: group_norm_triton(image, 32, torch.empty(320), torch.empty(320), 1e-5, True, 2), False),
    "predict": (lambda: predict_triton([x] * 3, [1.0, 2.0, 3.0]), False),
}
for name, (call, cores) in calls.items():
    found = launches(call)
    if not found:
        raise SystemExit(f"{name}: nothing is launched")
    for launch in found:
        built = build(launch, target)
        print(f"{name}: {built.name} shared {built.shared}")
        if not built.fits:
            raise SystemExit(f"{name}: {built.name} needs {built.shared} bytes of shared memory on sm_{target}")
        if cores and not built.tensor_cores:
            raise SystemExit(f"{name}: {built.name} uses no tensor cores on sm_{target}")
"""


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_kernel_compiles(target: int, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", PROGRAM, str(target)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
