"""What a tuning run is about, checked before any work, and how far it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.few_steps import FEW, STILL_HELPS

__all__ = ["FAMILIES", "Observe", "Progress", "checked"]

Observe = Callable[[float, str], None]
"""Hears how much of the work is done (0 to 1) and what is being done."""

FAMILIES = ("exact", "steps", "preset", "guidance", "schedule", "solver")
"""What a search may draw on."""


@dataclass
class Progress:
    """Weighs the stages of a search by what they take, in plain runs of all prompts."""

    observe: Observe
    total: float
    done: float = 0.0

    def part(self, weight: float, what: str) -> Callable[[float], None]:
        """A stage of that weight begins; returns what hears of its own progress."""
        start, self.done = self.done, self.done + weight
        self.observe(min(start / self.total, 1.0), what)
        return lambda share: self.observe(min((start + weight * share) / self.total, 1.0), what)


def checked(
    pipe: Any, prompts: Sequence[Any], call: Mapping[str, Any], seeds: Sequence[int] | None, families: Sequence[str]
) -> dict[str, Any]:
    """What is tuned on, checked."""
    takes = inspect.signature(type(pipe.wrapped).__call__).parameters
    argument = "prompt" if "prompt" in takes else "class_labels"
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("prompts must be a list of at least one prompt; four are enough")
    if argument not in takes:
        raise ConfigError(f"{type(pipe.wrapped).__name__} takes neither prompts nor class labels: it cannot be tuned")
    chosen = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(chosen) != len(prompts):
        raise ConfigError(f"there are {len(chosen)} seeds for {len(prompts)} prompts; give one each")
    for name in families:
        if name not in FAMILIES:
            raise ConfigError(f"families holds {name!r}; allowed: {', '.join(FAMILIES)}")
    options = {"num_inference_steps": takes["num_inference_steps"].default} | dict(call)
    _refuse_few(int(options["num_inference_steps"]))
    return {
        "prompts": list(prompts), "seeds": chosen, "call": options, "argument": argument, "families": list(families),
    }  # fmt: skip


def _refuse_few(steps: int) -> None:
    if steps <= FEW:
        raise MethodInapplicable(f"a run of {steps} steps leaves next to nothing to skip: {STILL_HELPS}")
