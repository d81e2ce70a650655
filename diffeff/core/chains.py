"""Nesting the hooks of several methods around one computation, outermost layer first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from diffeff.anatomy.types import AttentionSite
from diffeff.core.method import AttentionCall, Method
from diffeff.core.run import Run

__all__ = ["AttentionTap", "nest", "subscribers"]

T = TypeVar("T")
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def subscribers(methods: Sequence[Method[Any]], hook: str) -> list[Method[Any]]:
    """The methods that replace `hook`, outermost first."""
    return [m for m in methods if m.overriding(hook)]


def nest(hooks: Sequence[Callable[[T, Callable[[T], Any]], Any]], core: Callable[[T], Any]) -> Callable[[T], Any]:
    """`hooks[0](x, proceed)` around `hooks[1]` around ... around `core(x)`."""
    proceed = core
    for hook in reversed(hooks):
        proceed = _bind(hook, proceed)
    return proceed


def _bind(hook: Callable[[T, Callable[[T], Any]], Any], proceed: Callable[[T], Any]) -> Callable[[T], Any]:
    return lambda x: hook(x, proceed)


class AttentionTap(TorchFunctionMode):
    """While active, hands every scaled_dot_product_attention of one attention module to the methods' chain.

    All diffusers processors but the explicit-softmax ones end in this one function, with heads split and RoPE applied;
    taking it there needs no copy of any processor.
    """

    def __init__(self, run: Run, site: AttentionSite, methods: Sequence[Method[Any]]) -> None:
        super().__init__()
        self.run, self.site, self.methods = run, site, methods
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        named = dict(zip(_SDPA_NAMES, args, strict=False)) | (kwargs or {})
        call = AttentionCall(named.pop("query"), named.pop("key"), named.pop("value"), named)
        hooks = [self._hook(m) for m in self.methods]
        return nest(hooks, _sdpa)(call)

    def _hook(self, method: Method[Any]) -> Callable[[AttentionCall, Callable[[AttentionCall], Any]], Any]:
        return lambda call, proceed: method.around_attention(self.run, self.site, call, proceed)


def _sdpa(call: AttentionCall) -> torch.Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.v, **call.options)
