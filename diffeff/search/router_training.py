"""The training of a router: survey, trajectories, the price of computing, and the table it comes to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffeff.errors import ConfigError, DiffEffError, MethodInapplicable
from diffeff.methods.caching.published.harmonica import HarmoniCa
from diffeff.search.router_gates import Denoising, RouterSeam, Survey
from diffeff.search.router_objective import image_errors
from diffeff.search.router_state import RouterState
from diffeff.search.settings import Observe, Progress
from diffeff.search.trace import Job, attached

__all__ = ["Objective", "RouterOptions", "TrainedRouter", "Training"]

Objective = Literal["normalised", "published"]
SPEEDUP = 1.5
"""What is aimed at where nothing is asked for."""
_DRAWS = 100_000
"""Added to the seed for the noise of the trajectories: training never sees the noise that seeds from 0 up give."""
_ESTIMATE = 1 / 6
"""What measuring the steps' weights takes, in trajectories per step."""


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """What `diffeff.search.router.train` is asked for, checked. Raises ConfigError."""

    speedup: float | None
    compute: float | None
    seed: int
    batch: int
    trajectories: int
    rate: float
    reestimate: int
    objective: Objective

    def __post_init__(self) -> None:
        if self.speedup is not None and self.compute is not None:
            raise ConfigError("speedup and compute are two ways to say one target; give one of them")
        checks = (
            ("speedup", self.speedup is None or self.speedup > 1, "above 1"),
            ("compute", self.compute is None or 0 < self.compute < 1, "0 < compute < 1"),
            *((name, getattr(self, name) >= 1, "1 and up") for name in ("batch", "trajectories", "reestimate")),
            ("rate", 0 < self.rate <= 1, "0 < rate <= 1"),
            ("objective", self.objective in ("normalised", "published"), "normalised, published"),
        )
        for name, good, allowed in checks:
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")


@dataclass(frozen=True)
class TrainedRouter:
    """A trained router, and what its training says of it. `history` has one entry per trajectory: the weighted error
    (arbitrary unit), its share of modules computed, and the price of arithmetic it was trained at."""

    config: HarmoniCa
    share: float
    """Arithmetic of the modules that is computed, of all."""
    speedup: float
    """The denoiser's arithmetic over what is left of it: what wall time gains at most."""
    kinds: Mapping[str, float]
    """Share of calls computed, by kind of module."""
    history: tuple[Mapping[str, float], ...]
    trajectories: int
    finished: bool
    """False where the time limit ended it; the same call with the same `work` goes on."""
    seconds: float


@dataclass(frozen=True)
class _Draw(Job):
    """Prompts or class labels, by the name the pipeline has for them."""

    argument: str = "prompt"

    def run(self, pipe: Any, **more: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        options = {"output_type": "latent", "return_dict": False} | dict(self.call) | more
        found: Tensor = pipe(**{self.argument: list(self.prompts)}, generator=generators, **options)[0]
        return found


@dataclass
class Training:
    """One training."""

    pipe: Any
    settings: Mapping[str, Any]
    options: RouterOptions
    subject: Mapping[str, Any]
    work: Path | None
    minutes: float | None
    observe: Observe
    seam: RouterSeam = field(default_factory=lambda: RouterSeam(Survey()))

    def run(self) -> TrainedRouter:
        start = time.monotonic()
        with attached(self.pipe, self.seam) as play, _frozen(self.pipe):
            self._play = play
            self._survey()
            budget = self.budget  # refuses an impossible target before anything is trained
            state = self._begin()
            total = self.options.trajectories
            estimate, rounds = self.entries * _ESTIMATE, -(-total // self.options.reestimate)
            self.progress = Progress(self.observe, max(total - state.done, 1) + estimate * rounds)
            trained = state.seconds
            while state.done < total and not self._late(start):
                self._trajectory(state)
                state.seconds = trained + time.monotonic() - start
                if self.work is not None:
                    state.save(self.work, self.subject)
        self.observe(1.0, "done")
        return self._result(state, state.table(self.cost, budget))

    def _late(self, start: float) -> bool:
        return self.minutes is not None and time.monotonic() - start > 60 * self.minutes

    def _begin(self) -> RouterState:
        kept = None if self.work is None else RouterState.load(self.work, self.subject)
        return kept or RouterState.fresh(self.entries, len(self.columns), self.options.seed)

    # --- what is trained on --------------------------------------------------------------------------------------
    def _survey(self) -> None:
        names = [[m.name for m in denoiser.modules] for denoiser in self.pipe.denoisers]
        if not names[0] or any(other != names[0] for other in names):
            raise MethodInapplicable(
                "a router needs attention or feed-forward modules, and the same ones in all denoisers; this pipeline "
                f"has {', '.join(str(len(n)) for n in names)}. Use feature_cache instead."
            )
        self.columns = {name: number for number, name in enumerate(names[0])}
        self.observe(0.0, "count a plain run")
        self.survey = Survey()
        self.seam.play = self.survey
        self._play(self._job(0))
        if self.survey.first:
            raise MethodInapplicable("a router is trained on whole runs; this call begins late. Train it from noise.")

    def _job(self, number: int) -> _Draw:
        """Prompts and noise of one trajectory."""
        prompts, batch = self.settings["prompts"], self.options.batch
        places = range(number * batch, (number + 1) * batch)
        chosen = tuple(prompts[place % len(prompts)] for place in places)
        seeds = tuple(_DRAWS + self.options.seed + place for place in places)
        return _Draw(chosen, seeds, self.settings["call"], self.settings["argument"])

    @property
    def entries(self) -> int:
        return len(self.survey.times)

    @cached_property
    def cost(self) -> Tensor:
        """Arithmetic of each module [entries, modules]; each row adds up to 1."""
        rows = []
        for entry in range(self.entries):
            counts = self.survey.modules[self.survey.used[entry]]
            rows.append([counts.get(name, 0.0) for name in self.columns])
        found = torch.tensor(rows, dtype=torch.float64)
        return found / found.sum(dim=1, keepdim=True)

    @cached_property
    def rest(self) -> float:
        """Arithmetic outside the modules, of the whole denoiser's."""
        inside = sum(sum(self.survey.modules[name].values()) for name in self.survey.used.values())
        whole = sum(self.survey.calls[name] for name in self.survey.used.values())
        return 1 - inside / whole

    @cached_property
    def budget(self) -> float:
        """How many whole steps' worth of modules may be computed, the first step's included."""
        compute = self.options.compute
        if compute is None:
            compute = (1 / (self.options.speedup or SPEEDUP) - self.rest) / (1 - self.rest)
        least = 1 / self.entries
        if compute < least:
            most = 1 / (self.rest + (1 - self.rest) * least)
            raise ConfigError(
                f"the target leaves {compute:.3g} of the modules' arithmetic, but the first of {self.entries} steps is "
                f"always computed: speed-ups below {most:.3g} (compute from {least:.3g} up) can be trained for"
            )
        return float(compute) * self.entries

    # --- training ------------------------------------------------------------------------------------------------
    def _trajectory(self, state: RouterState) -> None:
        number, total = state.done, self.options.trajectories
        if number % self.options.reestimate == 0:
            part = self.progress.part(self.entries * _ESTIMATE, "what each step's errors do to the image")
            table = state.table(self.cost, self.budget)
            found = image_errors(self.seam, lambda: self._play(self._job(number)), table, self.columns, part)
            state.weights = found.weights(state.weights, self.options.objective == "published")
        self.progress.part(1, f"trajectory {number + 1} of {total}")
        logits = state.logits.clone().requires_grad_()
        self.seam.play = denoising = Denoising(logits, self.columns, state.weights)
        self._play(self._job(number))
        gradient = logits.grad
        if gradient is None or not bool(gradient.isfinite().all()):
            raise DiffEffError(
                "the denoiser's error has no finite gradient: nothing can be learned. Load the model in float32 "
                "(--dtype float32); a denoiser that is compiled or quantised must be trained plain."
            )
        price = self._learn(state, gradient, denoising.carried, self.options.rate * (1 - number / total))
        objective = sum(float(state.weights[i]) * e for i, e in denoising.errors.items()) / self.entries
        hard = (logits.detach() > 0).double()
        state.history.append(
            {"objective": objective, "share": float((hard * self.cost).sum()) / self.entries, "price": price}
        )
        state.done += 1

    def _learn(self, state: RouterState, gradient: Tensor, carried: Tensor, rate: float) -> float:
        """One step down the error plus the price of what is computed; returns that price (beta)."""
        p = state.logits.sigmoid()
        slope = p * (1 - p)
        benefit = (-gradient / slope / (2 * (1 - p)) - carried).clamp_min(0)
        cost = self.cost.float()
        price = _quantile(state.note_benefit(benefit)[1:] / cost[1:].clamp_min(1e-12), cost[1:], self.budget - 1)
        state.step(gradient + (carried + price * cost) * slope, rate)
        return price

    # --- result ----------------------------------------------------------------------------------------------------
    def _result(self, state: RouterState, table: list[list[bool]]) -> TrainedRouter:
        computed = torch.tensor(table)
        share = float((computed * self.cost).sum()) / self.entries
        speedup = 1 / (self.rest + (1 - self.rest) * share)
        kinds: dict[str, list[float]] = {}
        for site in self.pipe.denoisers[0].modules:
            kinds.setdefault(site.kind, []).append(float(computed[:, self.columns[site.name]].double().mean()))
        config = HarmoniCa(
            sites=tuple(self.columns),
            times=tuple(float(f"{t:.7g}") for t in self.survey.times),
            router=tuple("".join("01"[v] for v in row) for row in table),
            note=self._note(state, share, speedup),
        )
        finished = state.done >= self.options.trajectories
        by_kind = {kind: sum(found) / len(found) for kind, found in kinds.items()}
        return TrainedRouter(config, share, speedup, by_kind, tuple(state.history), state.done, finished, state.seconds)

    def _note(self, state: RouterState, share: float, speedup: float) -> str:
        options, kept = self.options, ("seed", "batch", "rate", "reestimate", "objective")
        told = ", ".join(f"{name} {getattr(options, name)}" for name in kept)
        return (
            f"trained on {state.done} of {options.trajectories} trajectories of {self.entries} steps from noise, "
            f"{len(self.settings['prompts'])} prompts, {told}; computes {100 * share:.1f} % of the modules' arithmetic "
            f"({speedup:.2f}x less in the denoiser)"
        )


def _quantile(values: Tensor, cost: Tensor, budget: float) -> float:
    """The value above which entries cost `budget` in all."""
    order = values.flatten().argsort(descending=True, stable=True)
    spent = cost.flatten()[order].cumsum(0)
    place = min(int((spent <= budget).sum()), len(order) - 1)
    return float(values.flatten()[order[place]])


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    """No gradients for the denoisers' own weights, for the length of a block."""
    weights = [w for denoiser in pipe.denoisers for w in denoiser.module.parameters() if w.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
