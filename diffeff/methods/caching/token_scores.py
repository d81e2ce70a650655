"""Which tokens a partial step computes: scores of tokens, and the choice of the highest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.anatomy.types import Grid
from diffeff.core.method import AttentionCall

__all__ = ["Place", "Score", "Scoring", "Shown", "attended", "chosen", "entropies", "windows"]

Score = Literal["auto", "attention", "entropy", "random"]
_QUERIES = 256
_TINY = torch.finfo(torch.float32).tiny


def attended(call: AttentionCall) -> Tensor:
    """s1 of ToCa: the attention mass each key token receives [rows, keys], the mean over heads, estimated from at most
    256 evenly spaced queries. Fused kernels give no attention map, so that much of one is computed."""
    q, k = call.q.detach(), _grouped(call)
    picked = torch.linspace(0, q.shape[2] - 1, min(_QUERIES, q.shape[2]), device=q.device).long()
    return _probabilities(call, q[:, :, picked], k, picked).sum(2).mean(1)


def entropies(call: AttentionCall) -> Tensor:
    """s2 of ToCa: the entropy of each query token's attention over the text [rows, queries], the mean over heads. A
    token whose attention is spread is influenced by the whole prompt."""
    found = _probabilities(call, call.q.detach(), _grouped(call), None)
    return -(found * found.clamp_min(_TINY).log()).sum(-1).mean(1)  # special.entr is ten times slower on CPUs


def _grouped(call: AttentionCall) -> Tensor:
    """Keys, one head for each of the queries'."""
    repeats = call.q.shape[1] // call.k.shape[1]
    return call.k.detach() if repeats == 1 else call.k.detach().repeat_interleave(repeats, dim=1)


def _probabilities(call: AttentionCall, q: Tensor, k: Tensor, picked: Tensor | None) -> Tensor:
    scale = call.options.get("scale") or q.shape[-1] ** -0.5
    logits: Tensor = q.float() @ k.float().transpose(-1, -2) * scale
    mask: Tensor | None = call.options.get("attn_mask")
    if mask is None:
        return logits.softmax(-1)
    if picked is not None and mask.shape[-2] > 1:
        mask = mask[..., picked, :]
    seen = logits.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else logits + mask.float()
    return seen.softmax(-1)


def windows(grid: Grid, size: int, device: torch.device) -> Tensor:
    """The number of the `size` x `size` window of its frame that each image token lies in [tokens]; windows at the
    border may be smaller."""
    t, y, x = (torch.arange(n, device=device) for n in (grid.frames, grid.height, grid.width))
    down, across = -(-grid.height // size), -(-grid.width // size)
    return ((t[:, None, None] * down + (y // size)[:, None]) * across + x // size).flatten()


@dataclass(frozen=True)
class Place:
    """Where a module's tokens are: from which token of the attention's sequence on, and from which of them on they are
    the image's (None: they are text)."""

    first: int
    grid: Grid
    image: int | None


@dataclass
class Shown:
    """What the attentions of one block showed when the block was last computed whole, by branch."""

    recording: bool = False
    mass: dict[str, Tensor] = field(default_factory=dict)
    """Attention each token of the sequence received [rows, tokens]."""
    entropy: dict[str, Tensor] = field(default_factory=dict)
    """Entropy of each image token's attention over the text [rows, tokens]."""
    grid: Grid | None = None

    def place(self, tokens: int, context: bool) -> Place | None:
        """Where so many tokens belong (`context`: the module is one of the text's); None where that is not known."""
        grid = self.grid
        if grid is None:
            return None
        lead = grid.text if grid.text_first else 0
        if tokens == grid.image_tokens + grid.text:
            return Place(0, grid, lead)
        if tokens == grid.image_tokens and not context:
            return Place(lead, grid, 0)
        return Place(0 if grid.text_first else grid.image_tokens, grid, None) if tokens == grid.text else None

    def base(self, score: Score, branch: str, hidden: Tensor, place: Place | None) -> Tensor:
        """The score of tokens [rows, tokens, ...] by what they are; zero where nothing is known of them."""
        entropy, mass = self.entropy.get(branch), self.mass.get(branch)
        if score != "attention" and entropy is not None and entropy.shape == hidden.shape[:2]:
            return entropy
        if score == "entropy" or mass is None:
            return hidden.new_zeros(hidden.shape[:2])
        first = 0 if place is None else place.first
        found = mass[:, first : first + hidden.shape[1]]
        return found if found.shape == hidden.shape[:2] else hidden.new_zeros(hidden.shape[:2])


@dataclass(frozen=True)
class Scoring:
    """How the scores of ToCa add up: s1 or s2 of unit length per row, plus `staleness` times the share of the interval
    since a token was last computed (s3); the best token of each `window` x `window` tokens is then raised by `spread`
    of its score (s4)."""

    staleness: float = 0.25
    spread: float = 0.4
    window: int = 2

    def __call__(self, base: Tensor, stale: Tensor, interval: int, place: Place | None) -> Tensor:
        """Scores [rows, tokens] from the `base` score, steps since computed (`stale`, int, of the same shape) and where
        the tokens are."""
        score = F.normalize(base.float(), dim=1) + self.staleness * stale / interval
        if place is None or place.image is None or not self.spread:
            return score
        image = score[:, place.image : place.image + place.grid.image_tokens]
        window = windows(place.grid, self.window, score.device).expand_as(image)
        best = image.new_full((len(image), int(window.max()) + 1), -torch.inf)
        best = best.scatter_reduce(1, window, image, "amax").gather(1, window)
        image += self.spread * image * (image == best)
        return score


def chosen(score: Tensor, count: int) -> Tensor:
    """The `count` best tokens of each row, in their order in the sequence [rows, count]."""
    return score.topk(count, dim=1).indices.sort(dim=1).values
