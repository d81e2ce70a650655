"""Which modules are really computed at which step: the record by which two caches are compared.

record = computed(pipe.unet, lambda: run("sd", pipe), {"up_blocks.0.resnets.0": "conv1"})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["computed"]


def computed(denoiser: Any, go: Callable[[], Any], inner: Mapping[str, str]) -> dict[str, list[int]]:
    """Calls of `denoiser` (counted from 0) at which each module named in `inner` computed its inner module."""
    found: dict[str, list[int]] = {name: [] for name in inner}
    calls = [-1]

    def count(*_: Any) -> None:
        calls[0] += 1

    handles = [denoiser.register_forward_pre_hook(count)]
    for name, path in inner.items():
        module = denoiser.get_submodule(name).get_submodule(path)
        note = lambda *_, name=name: found[name].append(calls[0])  # noqa: E731
        handles.append(module.register_forward_hook(note))
    try:
        go()
    finally:
        for handle in handles:
            handle.remove()
    return found
