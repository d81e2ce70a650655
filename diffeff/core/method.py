"""What a method is: a frozen config, and the object it builds, which acts at seams of the denoiser.

A method overrides only the hooks it needs; the session installs no seam that nobody overrides. `proceed` is the rest
of the chain: calling it 0, 1 or 2 times is caching, wrapping or verifying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from diffeff.anatomy.types import AttentionSite, BlockSite, DenoiserMap, ModuleSite, Segment, Streams

if TYPE_CHECKING:
    from diffeff.core.config import Config
    from diffeff.core.run import Run, StepCall

__all__ = ["AttentionCall", "Claim", "Layer", "Method", "Need", "Outputs", "SkipSegment", "Undo"]

ConfigT = TypeVar("ConfigT", bound="Config")
Undo = Callable[[], None]
Outputs = tuple["Tensor | None", ...]


class Layer(IntEnum):
    """Where a method stands in a chain, outermost first. Rewrites: PRUNE is applied before QUANTIZE."""

    PRUNE = 0
    QUANTIZE = 1
    SCHEDULE = 2
    CONTROL = 3
    GUIDANCE = 4
    STEP = 5
    SEGMENT = 6
    MODULE = 7
    TOKENS = 8
    ATTENTION = 9
    LINEAR = 10


class Claim(Enum):
    """An exclusive resource of a set of sites: two methods that claim the same one on the same site conflict."""

    TIMESTEPS = "the list of timesteps"
    SKIP_STEP = "skipping of whole denoiser calls"
    SKIP_BRANCH = "skipping of the unconditional branch"
    SKIP_BLOCK = "skipping of blocks"
    SKIP_MODULE = "skipping of attention and feed-forward modules"
    TOKEN_COUNT = "the number of query tokens"
    KEY_COUNT = "the number of key and value tokens"
    ATTENTION_KERNEL = "the attention kernel"
    LINEAR_WEIGHTS = "the weights of linear layers"
    SLICES = "the slices that blocks run in"


class Need(Enum):
    """A property of the model that a method relies on (`needs`) or destroys (`breaks`)."""

    SOFTMAX_PROBABILITIES = "softmax attention probabilities"
    FLOAT_WEIGHTS = "floating-point weights"
    BATCHED_ROWS = "batch rows that can be computed apart"
    EXACT_STEPS = "every step computed"


@dataclass(frozen=True)
class AttentionCall:
    """What an attention kernel is called with: q, k, v of shape [batch, heads, tokens, head_dim], RoPE applied.

    `options` are the other keyword arguments of `scaled_dot_product_attention` (attn_mask, dropout_p, is_causal,
    scale, enable_gqa).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: Mapping[str, Any]


class SkipSegment(Exception):
    """Raised inside a segment's first block by the method that let it be computed: predict the segment after all.

    For decisions that need what the block computes first, such as its modulated input.
    """

    def __init__(self, owner: Method[Any]) -> None:
        super().__init__(owner.config.name)
        self.owner = owner


class Method(Generic[ConfigT]):
    """Base of all methods. Every hook is optional; those left alone cost nothing.

    Life: `bind` once per attach (choose sites, raise MethodInapplicable when there are none), `rewrite` once per
    denoiser, then per run `begin`, the seam hooks, `end`. State that lasts longer than one hook belongs in
    `run.state(...)`, never on the method.
    """

    layer: ClassVar[Layer]
    claims: ClassVar[frozenset[Claim]] = frozenset()
    needs: ClassVar[frozenset[Need]] = frozenset()
    breaks: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    # --- attach -------------------------------------------------------------------------------------------------
    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        """Choose the sites to act on. Raises MethodInapplicable, with a reason, when there are none."""

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        """The sites (names inside `denoiser`) on which each claim is held; '*' is the whole denoiser."""
        return {claim: frozenset({"*"}) for claim in self.claims}

    def segments(self, denoiser: DenoiserMap) -> tuple[Segment, ...]:
        """Segments at which `enter_segment`, `predict_segment`, `leave_segment` are to be called."""
        return ()

    def block_sites(self, denoiser: DenoiserMap) -> tuple[BlockSite, ...]:
        """Blocks at which `around_block` is to be called."""
        return denoiser.blocks

    def attention_sites(self, denoiser: DenoiserMap) -> tuple[AttentionSite, ...]:
        """Attentions at which `around_attention` is to be called."""
        return denoiser.attentions

    def module_sites(self, denoiser: DenoiserMap) -> tuple[ModuleSite, ...]:
        """Attention and feed-forward modules at which `around_module` is to be called."""
        return denoiser.modules

    def linear_sites(self, denoiser: DenoiserMap) -> tuple[str, ...]:
        """Paths of linear layers at which `around_linear` is to be called."""
        return ()

    def rewrite_pipeline(self, pipeline: Any) -> Undo | None:
        """Change parts of the pipeline beside its denoisers (text encoder, VAE) once, at attach, before `rewrite`;
        returns what restores them."""
        return None

    def rewrite(self, denoiser: DenoiserMap) -> Undo | None:
        """Change weights or blocks once, at attach; returns what restores them bit for bit."""
        return None

    # --- run ----------------------------------------------------------------------------------------------------
    def begin(self, run: Run) -> None:
        """A run has opened and its timesteps are known. Refuse settings that cannot work by raising ConfigError."""

    def end(self, run: Run, error: BaseException | None) -> None:
        """The run is closing; `error` is what ended it early. State is dropped right after."""

    def around_schedule(self, run: Run, timesteps: Tensor, proceed: Callable[[Tensor], Tensor]) -> Tensor:
        """May change the list of timesteps that the scheduler has set."""
        return proceed(timesteps)

    def around_update(
        self, run: Run, prediction: Tensor, latents: Tensor, proceed: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        """Around the scheduler's step: the guided prediction and the latents it is applied to.

        A method that stands in for the scheduler returns the next latents instead of what `proceed` gives.
        """
        return proceed(prediction, latents)

    def around_step(self, run: Run, call: StepCall, proceed: Callable[[StepCall], Tensor]) -> Tensor:
        """Around one denoiser call; returns its prediction tensor."""
        return proceed(call)

    def enter_segment(self, run: Run, segment: Segment, streams: Streams) -> bool:
        """At the segment's first block: True to compute it, False to predict it. A method that only knows inside that
        block says True, and raises `SkipSegment(self)` there when it must not be computed."""
        return True

    def predict_segment(self, run: Run, segment: Segment, streams: Streams) -> Streams:
        """The segment's output from the streams it was entered with; stands in for its last block's output."""
        raise TypeError(f"{type(self).__name__} skips segments but predicts none")

    def leave_segment(self, run: Run, segment: Segment, before: Streams, after: Streams) -> None:
        """The segment was computed: what went in and what came out."""

    def around_block(
        self, run: Run, site: BlockSite, streams: Streams, proceed: Callable[[Streams], Streams]
    ) -> Streams:
        """Around one block, streams in and out."""
        return proceed(streams)

    def around_module(self, run: Run, site: ModuleSite, hidden: Tensor, proceed: Callable[[], Outputs]) -> Outputs:
        """Around one whole attention or feed-forward module. `hidden` is its first input; outputs are a tuple,
        also where the module returns a single tensor (joint attentions return one per stream).
        `proceed(other)` computes it on another first input, such as some of the tokens."""
        return proceed()

    def around_attention(
        self, run: Run, site: AttentionSite, call: AttentionCall, proceed: Callable[[AttentionCall], Tensor]
    ) -> Tensor:
        """Around the kernel of one attention: q, k, v in, [batch, heads, tokens, head_dim] out."""
        return proceed(call)

    def around_linear(
        self, run: Run, site: str, module: nn.Module, x: Tensor, proceed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Around one linear layer."""
        return proceed(x)

    # --- report and artefacts -----------------------------------------------------------------------------------
    def engaged(self, run: Run) -> tuple[bool, str]:
        """Whether the method did anything in this run, and one sentence on what (or why not)."""
        return True, ""

    def details(self, run: Run) -> Mapping[str, Any]:
        """Figures for the report: JSON scalars, lists and dicts of them."""
        return {}

    def inspect(self, denoiser: DenoiserMap) -> str:
        """One line for `diffeff inspect`: what this method could act on in this model; raises MethodInapplicable."""
        self.bind((denoiser,))
        return "applies"

    def artefacts(self) -> Mapping[str, Tensor]:
        """Tensors worth saving beside the plan, by name (safetensors). Only read while attached."""
        return {}

    def load_artefacts(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `artefacts` gave, before the rewrite."""

    def overriding(self, hook: str) -> bool:
        """Whether this method's class replaces the named hook."""
        return getattr(type(self), hook) is not getattr(Method, hook)
