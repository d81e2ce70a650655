"""Patches on instances: how a seam gets into a module or scheduler, and how it comes out again, exactly.

Never on classes. A patch goes where the call really passes: into the compiled call of a module compiled in place,
under accelerate's hook where there is one (accelerate puts its hook back after every pipeline call, and would drop a
patch above it), else over `forward`; in front of blocks under the split of context parallelism.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from diffeff.errors import AttachedModelError, ForeignPatchError

__all__ = ["Patch", "Seam", "own_tokens"]

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_CALLS = ("_compiled_call_impl", "_old_forward", "forward")
_MISSING = object()


class Seam:
    """The callable that stands in place of a method of one instance.

    It keeps the signature of what it replaces. A copy of a module that carries one would share our session's state
    with the original, so copying and pickling are refused; a scheduler's copy gets its plain method back, because
    pipelines do copy schedulers in mid-run.

    torch.compile leaves alone what methods do here, which changes from step to step, and goes on tracing what the seam
    stands in front of.
    """

    def __init__(self, owner: object, name: str, inner: Callable[..., Any], handler: Handler, plain_copy: bool) -> None:
        self.__wrapped__ = inner
        self.inner = inner
        self._owner = owner
        self._name = name
        self._handler = handler
        self._plain_copy = plain_copy

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = set_eval_frame(None)
        if tracer is None:
            return self._handler(self.inner, args, kwargs)
        try:
            return self._handler(partial(_traced, tracer, self.inner), args, kwargs)
        finally:
            set_eval_frame(tracer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self._owner))
        if self._plain_copy and copy is not None:
            return types.MethodType(getattr(type(self._owner), self._name), copy)
        return self._refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("pickled")

    def _refuse(self, verb: str) -> NoReturn:
        raise AttachedModelError(
            f"{type(self._owner).__name__} cannot be {verb} while a diffeff plan is attached: the copy would share the "
            "state of this session. Call remove() on the DiffEffPipeline first and apply the plan to the copy."
        )


class Patch:
    """One seam in one instance, with its exact inverse."""

    def __init__(self, owner: object, name: str, handler: Handler, *, plain_copy: bool = False) -> None:
        self.owner = owner
        self.name = name
        self._slots = _CALLS if name == "forward" else (name,)
        slot = next((s for s in self._slots[:-1] if owner.__dict__.get(s) is not None), name)
        self._before = owner.__dict__.get(slot, _MISSING)
        self.seam = Seam(owner, name, getattr(owner, slot), handler, plain_copy)
        owner.__dict__[slot] = self.seam

    def slot(self) -> str | None:
        """The attribute the seam sits in now (accelerate moves it); None when something covers or dropped it."""
        return next((s for s in self._slots if _under(self.owner.__dict__.get(s), self.seam)), None)

    def outdated(self) -> bool:
        """Whether the module was compiled in place after the seam went in, so that the seam is inside the graph."""
        compiled = self.owner.__dict__.get(_CALLS[0])
        return self.name == "forward" and compiled is not None and not _under(compiled, self.seam)

    def check(self) -> None:
        """Raise ForeignPatchError when the seam is not where it can be taken out."""
        if self.slot() is None:
            top = self.owner.__dict__.get(self._slots[-1])
            raise ForeignPatchError(
                f"{type(self.owner).__name__}.{self.name} was patched by someone else after the diffeff plan was "
                f"attached ({top!r}). Undo that patch first, then call remove() again; or enable it through the "
                "DiffEffPipeline, which takes the plan off and puts it back around such a call."
            )

    def undo(self) -> None:
        """Put back what was there, to the letter. Raises ForeignPatchError when a stranger's patch sits on top."""
        self.check()
        slot = self.slot() or self.name
        method = getattr(type(self.owner), self.name, None)
        own = None if method is None else types.MethodType(method, self.owner)
        if self._before is not _MISSING and not (slot == "forward" and self._before == own):
            self.owner.__dict__[slot] = self._before
        elif slot == "_old_forward":  # accelerate's hook came after us and calls through this attribute
            self.owner.__dict__[slot] = own
        else:
            del self.owner.__dict__[slot]


def own_tokens(module: nn.Module) -> object:
    """Where a seam in front of a block sees what the block computes: the block, or the place below the hook by which
    diffusers' context parallelism leaves each rank its share of the tokens."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return module
    places = zip(registry._hook_order, registry._fn_refs, strict=True)
    return next((place for name, place in places if name.startswith("cp_")), module)


def _traced(tracer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `inner` under the compiler that stood still for a seam."""
    set_eval_frame(tracer)
    try:
        return inner(*args, **kwargs)
    finally:
        set_eval_frame(None)


def _under(top: Any, seam: Seam) -> bool:
    """Whether `seam` is `top` or lies under seams of ours alone (several methods act on one module)."""
    while isinstance(top, Seam):
        if top is seam:
            return True
        top = top.inner
    return False
