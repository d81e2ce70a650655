"""A scripted denoiser: methods are driven through a whole run without any model, so that the maths can be checked.

seen = drive([FeatureCache(interval=2)], lambda x, branch, i: x * i, steps=8)
seen.outputs["cond"][3], seen.computed["cond"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.anatomy.types import CFG, DenoiserMap
from diffeff.core.chains import nest
from diffeff.core.config import Config
from diffeff.core.method import Method
from diffeff.core.run import Clock, Run, StepCall

__all__ = ["Seen", "denoiser_map", "drive"]

Model = Callable[[Tensor, str, int], Tensor]
"""(rows of one branch, branch, entry) -> prediction of these rows."""


@dataclass
class Seen:
    """What happened: predictions by branch and entry, entries computed by branch, and the run and methods."""

    run: Run
    methods: list[Method[Any]]
    outputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    computed: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)

    def engaged(self, index: int = 0) -> tuple[bool, str]:
        return self.methods[index].engaged(self.run)

    def details(self, index: int = 0) -> Any:
        return self.methods[index].details(self.run)


def denoiser_map(cfg: CFG, name: str = "transformer") -> DenoiserMap:
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    return DenoiserMap(name, nn.Identity(), "scripted", (), cfg, True, names)


def drive(
    configs: Sequence[Config],
    model: Model,
    *,
    steps: int = 8,
    batch: int = 1,
    cfg: CFG = CFG.SEPARATE,
    branches: tuple[str, ...] = ("cond", "uncond"),
    latents: Callable[[int], Tensor] | None = None,
    sigmas: Tensor | None = None,
    timesteps: Tensor | None = None,
    first: int = 0,
    expert: Callable[[int], str] = lambda i: "transformer",
) -> Seen:
    """Run `configs` over a schedule; batched guidance calls once per step with both branches' rows."""
    methods = sorted((c.build() for c in configs), key=lambda m: m.layer)
    times = torch.linspace(1000, 1000 / steps, steps) if timesteps is None else timesteps
    clock = Clock(first, len(times), first, times, times / 1000 if sigmas is None else sigmas)
    run = Run("Scripted", True, clock, latent_rows=batch)
    seen = Seen(run, methods)
    look = latents or (lambda i: torch.full((batch, 2, 3), 1.0 + 0.1 * i))
    for method in methods:
        method.begin(run)
    for index in range(first, len(times)):
        clock.index = index
        for call in _calls(denoiser_map(cfg, expert(index)), look(index), branches):
            _step(seen, call, model)
    return seen


def _calls(denoiser: DenoiserMap, x: Tensor, branches: tuple[str, ...]) -> list[StepCall]:
    if denoiser.cfg is CFG.SEPARATE or len(branches) == 1:
        return [StepCall(denoiser, branch, (x,), {}) for branch in branches]
    return [StepCall(denoiser, "both", (torch.cat([x, x]),), {})]


def _names(run: Run, call: StepCall) -> list[str]:
    if call.branch != "both":
        return [call.branch]
    return ["uncond", "cond"] if call.denoiser.cfg is CFG.BATCHED_UNCOND_FIRST else ["cond", "uncond"]


def _step(seen: Seen, call: StepCall, model: Model) -> None:
    run, index = seen.run, seen.run.clock.index

    def compute(c: StepCall) -> Tensor:
        names = _names(run, c)
        for name in names:
            seen.computed.setdefault(name, []).append(index)
            seen.rows.setdefault(name, []).append(c.rows // len(names))
        pieces = zip(c.sample.chunk(len(names)), names, strict=True)
        return torch.cat([model(x, name, index) for x, name in pieces])

    hooks = [lambda c, go, m=m: m.around_step(run, c, go) for m in seen.methods]
    with run.on_call(call):
        output = nest(hooks, compute)(call)
    for name, piece in zip(_names(run, call), output.chunk(len(_names(run, call))), strict=True):
        seen.outputs.setdefault(name, {})[index] = piece.clone()
