"""How much the finished image owes to what a router does at each step: the weights of its training (IEPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.search.router_gates import Gated, RouterSeam

__all__ = ["ImageErrors", "image_errors"]


@dataclass(frozen=True)
class ImageErrors:
    """By entry: mean squared change of the final latents that the router's row caused, and mean squared error that it
    made in the denoiser's prediction (branches added up). Both are 0 at the first entry."""

    image: Tensor
    step: Tensor

    def weights(self, before: Tensor, published: bool) -> Tensor:
        """Weights of the entries' errors in the training, of mean 1 over the entries that can be gated.

        As published, the weight is the image's change itself: large where the router does much harm now. Otherwise it
        is the change per error, so that weight times error estimates the image's change, whatever the router did when
        it was measured. Rows that gated nothing measured nothing: they keep their weight of `before`.
        """
        known = self.step > 0
        sensitivity = self.image / self.step.clamp_min(torch.finfo(self.step.dtype).tiny)
        found = (
            self.image if published else torch.where(known, sensitivity, before * _ratio(sensitivity, before, known))
        )
        mean = found[1:].mean()
        return found / mean if float(mean) > 0 else before


def _ratio(new: Tensor, old: Tensor, known: Tensor) -> Tensor:
    """What brings old weights to the scale of new ones, by the entries where both are known."""
    base = old[known].sum()
    return new[known].sum() / base if float(base) > 0 else torch.ones(())


def image_errors(
    seam: RouterSeam,
    run: Callable[[], object],
    table: list[list[bool]],
    columns: dict[str, int],
    observe: Callable[[float], None] = lambda done: None,
) -> ImageErrors:
    """Switch the router on for one more entry at a time, and measure what each adds, without gradients.

    `run` plays one fixed job (same prompts, same noise each time) on the pipeline that carries `seam`. Run k gates
    entries up to k and computes the rest; the change from run k - 1 to run k is what entry k did to the image, given
    what the router did before it. What both have in common is not computed again: about half a run per entry.

    Source: HarmoniCa (arXiv 2410.01723); its formula leaves one entry out of a gated run instead, its code is as here.
    """
    total = len(table)
    image, step = torch.zeros(total), torch.zeros(total)
    gated = Gated(table, columns, 0)
    before = _final(seam, run, gated)
    for entry in range(1, total):
        expected = gated.plain
        gated = replace(gated, last=entry, plain={})
        after = _final(seam, run, gated)
        image[entry] = F.mse_loss(after, before)
        step[entry] = sum(F.mse_loss(gated.said[entry, b].float(), x.float()) for b, x in expected.items())
        before = after
        observe(entry / total)
    return ImageErrors(image, step)


def _final(seam: RouterSeam, run: Callable[[], object], gated: Gated) -> Tensor:
    seam.play, seam.final = gated, None
    run()
    if seam.final is None:
        raise RuntimeError("router: the run ended without an update of the latents")
    return seam.final.float()
