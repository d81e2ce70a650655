"""One call of a tiny pipeline, and how one is built and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["TEXT", "WIDTH", "Request", "Tiny"]

TEXT = 7
"""Text tokens of a prompt (Wan image-to-video excepted: it counts 512)."""
WIDTH = 16
"""Channels of a text embedding."""


@dataclass(frozen=True)
class Request:
    """One call: `size` is (frames, height, width) of the latents; every random input comes from `seed`."""

    pipe: Any
    steps: int
    seed: int
    batch: int
    size: tuple[int, int, int]
    guidance: bool

    def noise(self, *shape: int, key: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * self.seed + key + 1))

    def text(self, tokens: int = TEXT, width: int = WIDTH) -> dict[str, Tensor]:
        """Embeddings of the prompts, and of the negative ones when guided."""
        found = {"prompt_embeds": self.noise(self.batch, tokens, width, key=1)}
        if self.guidance:
            found["negative_prompt_embeds"] = self.noise(self.batch, tokens, width, key=2)
        return found

    def pooled(self, width: int = WIDTH) -> dict[str, Tensor]:
        found = {"pooled_prompt_embeds": self.noise(self.batch, width, key=3)}
        if self.guidance:
            found["negative_pooled_prompt_embeds"] = self.noise(self.batch, width, key=4)
        return found

    def distilled(self) -> dict[str, Tensor]:
        """The prompts where guidance is an input of the model: one branch, whatever its scale."""
        return {key: value for key, value in {**self.text(), **self.pooled()}.items() if "negative" not in key}

    def masks(self) -> dict[str, Tensor]:
        """Attention masks of the prompts: the last two tokens are padding."""
        mask = torch.ones(self.batch, TEXT, dtype=torch.long)
        mask[:, -2:] = 0
        found = {"prompt_attention_mask": mask}
        if self.guidance:
            found["negative_prompt_attention_mask"] = mask.clone()
        return found

    def pixels(self, scale: int = 8) -> dict[str, int]:
        return {"height": self.size[1] * scale, "width": self.size[2] * scale}

    def video(self, scale: int = 8, temporal: int = 4) -> dict[str, int]:
        return {**self.pixels(scale), "num_frames": (self.size[0] - 1) * temporal + 1}

    def images(self) -> list[Image.Image]:
        height, width = self.size[1] * 8, self.size[2] * 8
        rows = torch.rand(self.batch, height, width, 3, generator=torch.Generator().manual_seed(self.seed))
        return [Image.fromarray((255 * row).numpy().astype(np.uint8)) for row in rows]


@dataclass(frozen=True)
class Tiny:
    """How one tiny pipeline is built and called."""

    build: Callable[[], Any]
    call: Callable[[Request], dict[str, Any]]
    size: tuple[int, int, int] = (1, 8, 12)
    """Default (frames, height, width) of the latents."""
    scale: float = 4.0
    """guidance_scale of a guided call."""
    max_batch: int = 8
    resizable: bool = True
