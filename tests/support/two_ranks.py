"""Two processes of one gloo group: each runs `job(rank)`, and what both return comes back as a list.

found = on_two_ranks(job, tmp_path)      # job: a function of a module; its result goes through JSON
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import scripted
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

__all__ = ["counting", "marked", "on_two_ranks"]

Job = Callable[[int], Any]


def on_two_ranks(job: Job, folder: Path) -> list[Any]:
    """What `job` returned on rank 0 and on rank 1. A rank that waits for the other in vain fails after 30 s."""
    multiprocessing.spawn(_work, (job, str(folder)), nprocs=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def _work(rank: int, job: Job, folder: str) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]  # diffusers divides by it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    try:
        Path(folder, f"rank{rank}.json").write_text(json.dumps(job(rank)))
    finally:
        dist.destroy_process_group()


@contextmanager
def marked(parallel: bool) -> Iterator[None]:
    """Scripted denoisers are shared out among the ranks, marked as diffusers' `enable_parallelism` marks a model."""
    plain, module = scripted.denoiser_map, nn.Identity()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    context = SimpleNamespace(_flattened_mesh=mesh)
    config = SimpleNamespace(context_parallel_config=context, tensor_parallel_config=None, _device=torch.device("cpu"))
    if parallel:
        module._parallel_config = config  # type: ignore[assignment]
    scripted.denoiser_map = lambda cfg, name="transformer": replace(plain(cfg, name), module=module)
    try:
        yield
    finally:
        scripted.denoiser_map = plain


@contextmanager
def counting() -> Iterator[list[int]]:
    """The sizes of all reductions that are made."""
    plain, sizes = dist.all_reduce, []

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = plain
