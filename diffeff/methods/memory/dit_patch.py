"""Another forward for one module, put where the call really passes, and who else has a hand on a module."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from diffeff.core.method import Undo
from diffeff.errors import ForeignPatchError, PlanConflict

__all__ = ["override", "watched"]

Forward = Callable[..., Any]
_ABSENT = object()


class _Slot:
    """One place that holds a module's forward: an entry of its `__dict__`, or a link of diffusers' hook chain."""

    def __init__(self, holder: dict[str, Any], key: str) -> None:
        self._holder, self._key = holder, key

    def get(self) -> Any:
        return self._holder.get(self._key, _ABSENT)

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            self._holder.pop(self._key, None)
        else:
            self._holder[self._key] = value


def _slots(module: nn.Module) -> Iterator[_Slot]:
    """Where the forward may sit, innermost first: under diffusers' hooks, under accelerate's hook, on the module."""
    registry = module.__dict__.get("_diffusers_hook")
    for link in getattr(registry, "_fn_refs", ()):
        yield _Slot(link.__dict__, "original_forward")
        yield _Slot(link.__dict__, "forward")
    yield _Slot(module.__dict__, "_old_forward")
    yield _Slot(module.__dict__, "forward")


def _own(module: nn.Module) -> Forward:
    return types.MethodType(type(module).forward, module)


def _plain_slot(module: nn.Module) -> _Slot:
    """The place of the module's own forward. Raises PlanConflict when someone else's function stands there."""
    own, slots = _own(module), list(_slots(module))
    found = next((slot for slot in slots if slot.get() == own), None)
    if found is None and slots[-1].get() is _ABSENT:
        found = slots[-1]
    if found is None:
        raise PlanConflict(
            f"{type(module).__name__}.forward was replaced by another tool ({slots[-1].get()!r}): feature_slicing puts "
            "its own there. Undo that patch first, then apply the plan."
        )
    return found


def override(module: nn.Module, forward: Forward) -> Undo:
    """Let `module` run `forward` instead of its own, under any offloading hook; returns the exact inverse.

    Raises PlanConflict when the module's forward is already someone else's. The inverse finds `forward` again where
    hooks set up since have moved it, and raises ForeignPatchError when it is gone.
    """
    slot = _plain_slot(module)
    before = slot.get()
    slot.put(forward)

    def undo() -> None:
        now = next((s for s in _slots(module) if s.get() is forward), None)
        if now is None:
            raise ForeignPatchError(
                f"{type(module).__name__}.forward was replaced after feature_slicing had been applied. Undo that patch "
                "first, then call remove() again."
            )
        home = now.get() is slot.get()
        now.put(before if home else _own(module))

    return undo


_CALLS = ("_compiled_call_impl", "_diffusers_hook", "_old_forward", "forward")


def watched(module: nn.Module, besides: tuple[str, ...] = ()) -> bool:
    """Whether someone has a hand on the module's calls: another method's seam, a hook, a compiled call. Such a module
    must be called as it would be without us: once, with whole tensors. `besides`: entries that are ours."""
    own = module.__dict__
    held = any(own.get(name) is not None for name in _CALLS if name not in besides)
    return held or bool(module._forward_hooks or module._forward_pre_hooks)
