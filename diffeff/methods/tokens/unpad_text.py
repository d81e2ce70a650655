"""UnpadText: the padding of prompts is not computed. Exact to rounding, no setting, no calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffeff.anatomy.types import AttentionSite, DenoiserMap, TextPadding
from diffeff.core.config import Config, knob
from diffeff.core.method import AttentionCall, Claim, Layer, Method, Undo
from diffeff.core.run import Run, StepCall
from diffeff.core.seams import Patch
from diffeff.errors import ConfigError, MethodInapplicable

__all__ = ["UnpadText", "UnpadTextMethod", "cut_alike", "cut_masked"]

TEXTS = 4
"""Text tensors remembered at once: one per branch, and what other methods make of them."""


@dataclass(frozen=True, kw_only=True)
class UnpadText(Config):
    """The padding of prompts is left out, in the text encoder and in every cross-attention. Exact to rounding.

    Pipelines pad every prompt to a fixed length: Wan to 512 tokens, PixArt and LTX to 128 to 300. The text encoder
    works on all of them, and so do the key and value projections of every cross-attention at every step.

    Where the padding is masked it cannot change anything and is cut off. Where it is not (Wan: the embeddings behind
    the prompt are zeros, which all attentions see), its n keys and values are alike, and softmax over n equal keys is
    softmax over one of them with log n added to its score: one is kept, with that bias. Lengths are rounded up to
    `multiple`, so that prompts of similar length have the same shape.

    Worth the more the fewer the image tokens are: text is a third of the arithmetic of a small Wan clip and little of a
    large one. Models whose padding means something (CLIP, T5 without a mask as in Flux and CogVideoX) are refused.

    Source: our own derivation; unpadded attention is usual in language models (FlashAttention's varlen kernels), and
    counting merged keys by a log-size bias is ToMe's proportional attention (arXiv 2210.09461).
    """

    name: ClassVar[str] = "unpad_text"
    summary: ClassVar[str] = "The padding of prompts is not computed: exact, and a third of a small clip's work."

    multiple: int = knob(8, "round text lengths up to a multiple of this", low=1, high=128, step=8)
    encoder: bool = knob(True, "leave padding out in the text encoder too")

    def build(self) -> UnpadTextMethod:
        return UnpadTextMethod(self)


@dataclass(frozen=True)
class Cut:
    """A text without most of its padding.

    `text`: [batch, kept, channels]. `bias`: [batch, 1, 1, kept] to be added to the attention's scores, None where a
    mask serves. `mask`: [batch, kept], None where the pipeline passes none. `before`: tokens before the cut.
    """

    text: Tensor
    bias: Tensor | None
    mask: Tensor | None
    before: int


def cut_alike(text: Tensor, multiple: int) -> Cut | None:
    """Leave out trailing tokens that are all the same, up to one that counts for them; None where nothing can go.

    `text`: [batch, tokens, channels]. Reads lengths back from the device once.
    """
    total = text.shape[1]
    differs = (text != text[:, -1:]).any(-1)
    lengths = [_last(row) for row in differs.cpu()]
    kept = _rounded(max(lengths) + 1, multiple)
    if kept >= total:
        return None
    counts = torch.tensor([(total - n) / (kept - n) for n in lengths], dtype=torch.float32, device=text.device)
    padding = torch.arange(kept, device=text.device) >= torch.tensor(lengths, device=text.device)[:, None]
    bias = (counts.log()[:, None] * padding).to(text.dtype)
    return Cut(text[:, :kept], bias[:, None, None], None, total)


def cut_masked(text: Tensor, mask: Tensor, multiple: int) -> Cut | None:
    """Leave out trailing tokens that no row attends to; None where nothing can go.

    `text`: [batch, tokens, channels]; `mask`: [batch, tokens], nonzero where attended. A text that is masked whole
    stays as it is.
    """
    longest = _last((mask != 0).any(0).cpu())
    kept = _rounded(longest, multiple)
    if longest == 0 or kept >= text.shape[1]:
        return None
    return Cut(text[:, :kept], None, mask[:, :kept], text.shape[1])


def _last(flags: Tensor) -> int:
    """One more than the index of the last true flag; 0 where none is."""
    found = flags.nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass
class _Ledger:
    """What one run remembers: texts with what was cut of them, and what the present call still owes."""

    texts: list[tuple[Tensor, Any, Cut | None]] = field(default_factory=list)
    present: Cut | None = None
    biased: int = 0
    checked: bool = False
    calls: int = 0
    before: int = 0
    after: int = 0


class UnpadTextMethod(Method[UnpadText]):
    """Hands the denoiser a shorter text; where padding is seen by the attention, adds the bias that stands for it."""

    layer: ClassVar[Layer] = Layer.TOKENS
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.KEY_COUNT})

    def __init__(self, config: UnpadText) -> None:
        super().__init__(config)
        self._encoded: tuple[int, int] | None = None

    # --- attach -------------------------------------------------------------------------------------------------
    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        for denoiser in denoisers:
            if denoiser.padding is TextPadding.KEPT:
                raise MethodInapplicable(
                    f"unpad_text: {denoiser.name} ({denoiser.family}) attends to the padding of its prompts, and what "
                    "stands there differs from token to token: leaving it out would change the result."
                )
            if any(getattr(site.module, "add_k_proj", None) is not None for site in self.attention_sites(denoiser)):
                raise MethodInapplicable(
                    f"unpad_text: {denoiser.name} reads image tokens from the same sequence at fixed places"
                )

    def attention_sites(self, denoiser: DenoiserMap) -> tuple[AttentionSite, ...]:
        if denoiser.padding is not TextPadding.ALIKE:
            return ()
        return tuple(site for site in denoiser.attentions if site.kind == "cross")

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.KEY_COUNT: frozenset(site.name for site in denoiser.attentions if site.kind == "cross")}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        return f"the prompts' padding, which {denoiser.family} gives {denoiser.padding.value}, is left out"

    def rewrite_pipeline(self, pipeline: Any) -> Undo | None:
        encoder = getattr(pipeline, "text_encoder", None)
        if encoder is None or not self.config.encoder:
            return None
        return Patch(encoder, "forward", self._encode).undo

    def _encode(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A text encoder's forward on the real tokens; zeros where the padding's embeddings were."""
        named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        plain = set(named) <= {"input_ids", "attention_mask", "return_dict"} and named.get("return_dict") is not False
        if not plain or len(args) > 2 or not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
            return inner(*args, **kwargs)
        total = ids.shape[1]
        longest = _last((mask != 0).any(0).cpu())
        kept = min(_rounded(max(longest, 1), self.config.multiple), total)
        found = inner(**(named | {"input_ids": ids[:, :kept], "attention_mask": mask[:, :kept]}))
        self._encoded = total, kept
        short = found.last_hidden_state
        found.last_hidden_state = torch.cat([short, short.new_zeros(short.shape[0], total - kept, short.shape[2])], 1)
        return found

    # --- run ----------------------------------------------------------------------------------------------------
    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        ledger = self._ledger(run)
        cut = self._cut(ledger, call)
        if cut is None:
            return proceed(call)
        changed = {call.denoiser.text or "": cut.text}
        if cut.mask is not None:
            changed["encoder_attention_mask"] = cut.mask
        ledger.present, ledger.biased = cut, 0
        try:
            prediction = proceed(replace(call, args=(), kwargs=call.arguments | changed))
        finally:
            ledger.present = None
        self._check(ledger, cut, call.denoiser)
        ledger.calls += 1
        ledger.before, ledger.after = cut.before, cut.text.shape[1]
        return prediction

    def _cut(self, ledger: _Ledger, call: StepCall) -> Cut | None:
        """The call's text without padding, found once per text."""
        text = call.argument(call.denoiser.text or "")
        if not isinstance(text, Tensor) or text.ndim != 3:
            return None
        mask = call.argument("encoder_attention_mask")
        for known, beside, cut in ledger.texts:
            if known is text and beside is mask:
                return cut
        if call.denoiser.padding is TextPadding.ALIKE:
            cut = cut_alike(text, self.config.multiple)
        else:
            cut = cut_masked(text, mask, self.config.multiple) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        ledger.texts = [*ledger.texts[-TEXTS + 1 :], (text, mask, cut)]
        return cut

    def _check(self, ledger: _Ledger, cut: Cut, denoiser: DenoiserMap) -> None:
        """At the first call, which computes everything, each cross-attention must have had its bias."""
        wanted = 0 if cut.bias is None else len(self.attention_sites(denoiser))
        if not ledger.checked and ledger.biased != wanted:
            raise ConfigError(
                f"unpad_text: {ledger.biased} of {wanted} cross-attentions of {denoiser.name} could be told of the "
                "padding left out. Another tool or attention backend computes the rest: take it off "
                "(set_attention_backend('native')), or leave unpad_text out."
            )
        ledger.checked = True

    def around_attention(
        self, run: Run, site: AttentionSite, call: AttentionCall, proceed: Callable[[AttentionCall], Tensor]
    ) -> Tensor:
        ledger = self._ledger(run)
        if ledger.present is None or ledger.present.bias is None:
            return proceed(call)
        bias, given = ledger.present.bias.to(call.q.dtype), call.options.get("attn_mask")
        if given is not None:
            raise ConfigError(f"unpad_text: {site.name} was given a mask of its own; leave unpad_text out here")
        ledger.biased += 1
        return proceed(replace(call, options={**call.options, "attn_mask": bias}))

    def _ledger(self, run: Run) -> _Ledger:
        return run.state(self, _Ledger, branch="")

    # --- report -------------------------------------------------------------------------------------------------
    def engaged(self, run: Run) -> tuple[bool, str]:
        ledger = self._ledger(run)
        encoded = f"; the text encoder worked on {self._encoded[1]} of {self._encoded[0]}" if self._encoded else ""
        if not ledger.calls:
            return self._encoded is not None, f"the denoiser's texts have no padding to leave out{encoded}"
        return True, f"{ledger.after} of {ledger.before} text tokens kept in {ledger.calls} calls{encoded}"

    def end(self, run: Run, error: BaseException | None) -> None:
        self._encoded = None

    def details(self, run: Run) -> Mapping[str, Any]:
        ledger = self._ledger(run)
        return {"calls": ledger.calls, "tokens_before": ledger.before, "tokens_kept": ledger.after}
