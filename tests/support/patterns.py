"""Which steps a cache skips: diffusers' own caches, seen from outside, and ours, from the report."""

from __future__ import annotations

from typing import Any

import torch
from tiny import make, run
from torch import Tensor

from diffeff.core.config import Config
from diffeff.pipeline import DiffEffPipeline
from diffeff.search.trace import Job

__all__ = ["TinyJob", "diffusers_run", "our_run"]


def _attention(transformer: Any) -> torch.nn.Module:
    """An attention of the second block: computed where the blocks behind the first are."""
    blocks = getattr(transformer, "blocks", None) or transformer.transformer_blocks
    found: torch.nn.Module = blocks[1].attn1 if hasattr(blocks[1], "attn1") else blocks[1].attn
    return found


def diffusers_run(family: str, config: Any, steps: int, **options: Any) -> tuple[list[int], Tensor]:
    """Steps that a diffusers cache skips in an unguided run, and its output."""
    pipe = make(family)
    pipe.transformer.enable_cache(config)
    computed: list[bool] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: computed.append(False))
    _attention(pipe.transformer).to_q.register_forward_hook(lambda *_: computed.__setitem__(-1, True))
    output = run(family, pipe, steps=steps, guidance=False, **options)
    return [i for i, done in enumerate(computed) if not done], output


def our_run(family: str, config: Config, steps: int, **options: Any) -> tuple[list[int], Tensor]:
    """Steps that a cache of ours skips (of the first denoiser), and its output."""
    pipe = DiffEffPipeline(make(family), [config])
    output = run(family, pipe, steps=steps, **{"guidance": False, **options})
    assert pipe.report is not None
    details = pipe.report.methods[0].details
    rows = [row for row in (details, *details.values()) if isinstance(row, dict) and "skipped_steps" in row]
    return list(rows[0]["skipped_steps"]), output


class TinyJob(Job):
    """A search's job on a tiny pipeline, which takes embeddings instead of prompts."""

    def __init__(self, family: str, steps: int) -> None:
        super().__init__(("",), (0,), {"num_inference_steps": steps})
        object.__setattr__(self, "family", family)

    def run(self, pipe: Any, **more: Any) -> Tensor:
        steps: int = self.call["num_inference_steps"]
        return run(vars(self)["family"], pipe, steps=steps, **more)
