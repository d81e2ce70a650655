"""Attention of UNets in slices, exact: less memory for it, and on CUDA the kernel made for attention over frames.

The UNets of diffusers call torch's attention from processors that never reach its dispatcher, so that
`set_attention_backend` passes over them without a word. Here their processors are replaced, on the instances.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from diffeff.anatomy.types import AttentionSite, DenoiserMap
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method, Undo
from diffeff.core.run import Run
from diffeff.errors import MethodInapplicable
from diffeff.methods.attention.processor import Counts, SlicedProcessor

__all__ = ["SlicedAttention"]


@dataclass(frozen=True, kw_only=True)
class SlicedAttention(Config):
    """Bounds the memory of a UNet's attentions; the result is that of the model up to rounding.

    Queries, keys, values and outputs exist for at most `slice_tokens` query tokens at a time instead of for the whole
    batch of frames and guidance branches. Rows that are longer keep their keys and values whole and cut the queries.
    On CUDA attention over frames runs in a kernel of its own, without the limit of 65,535 rows. Smaller slices take
    less memory and, on a GPU, more time.

    Left to the model: attentions with a mask, IP-Adapters, and calls at whose seam another method or guider acts
    (kv_downsample, perturbed-attention guidance); the report counts them. Transformers have diffusers' dispatcher:
    use `set_attention_backend` there.
    """

    name: ClassVar[str] = "sliced_attention"
    summary: ClassVar[str] = "Less memory in UNets: attention in slices, exact; on CUDA a kernel for frames."

    slice_tokens: int = knob(4096, "query tokens computed at a time, over all rows of the batch", low=1, step=256)

    def build(self) -> SlicedAttentionMethod:
        return SlicedAttentionMethod(self)


class SlicedAttentionMethod(Method[SlicedAttention]):
    """Puts a `SlicedProcessor` in place of each plain processor, and the old one back."""

    layer: ClassVar[Layer] = Layer.ATTENTION
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.ATTENTION_KERNEL})

    def __init__(self, config: SlicedAttention) -> None:
        super().__init__(config)
        self._counts = Counts()

    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        if not any(_plain(d) for d in denoisers):
            names = ", ".join(f"{d.name} ({d.family})" for d in denoisers)
            raise MethodInapplicable(
                f"sliced_attention finds none of the plain attention processors of UNets in {names}. Transformers "
                "choose their kernel in diffusers: set_attention_backend(...)."
            )

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.ATTENTION_KERNEL: frozenset(site.name for site in _plain(denoiser))}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        return f"{len(_plain(denoiser))} attentions can run in slices"

    def rewrite(self, denoiser: DenoiserMap) -> Undo | None:
        with ExitStack() as stack:
            for site in _plain(denoiser):
                module: Any = site.module
                before = module.processor
                module.processor = SlicedProcessor(before, self.config.slice_tokens, self._counts)
                stack.callback(_restore, module, before)
            return stack.pop_all().close

    def begin(self, run: Run) -> None:
        self._counts.clear()

    def engaged(self, run: Run) -> tuple[bool, str]:
        counts = self._counts
        left = "; ".join(f"{n} handed on: {reason}" for reason, n in counts.handed_on.items())
        if not counts.calls:
            return False, left or "no attention was reached"
        return True, f"{counts.calls} attention calls in {counts.parts} parts" + (f"; {left}" if left else "")

    def details(self, run: Run) -> Mapping[str, Any]:
        counts = self._counts
        return {"calls": counts.calls, "parts": counts.parts, "handed_on": dict(counts.handed_on)}


def _plain(denoiser: DenoiserMap) -> list[AttentionSite]:
    """The sites whose processor is diffusers' plain one; IP-Adapters, PAG and users' own stay as they are."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    kinds = (AttnProcessor, AttnProcessor2_0)
    return [site for site in denoiser.attentions if type(getattr(site.module, "processor", None)) in kinds]


def _restore(module: Any, before: Any) -> None:
    """Put the old processor back, unless someone has put another in our place since."""
    if isinstance(module.processor, SlicedProcessor):
        module.processor = before
