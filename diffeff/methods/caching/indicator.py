"""How much has changed since the last computed step: one number from tensors that are at hand before computing.

Each call reads one number back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Accumulated",
    "Drift",
    "Indicator",
    "InputChange",
    "Link",
    "TransformRate",
    "mean_distance",
    "relative_change",
]


def _read(*values: Tensor) -> list[float]:
    """Scalars brought back from the device, all at once."""
    found: list[float] = torch.stack(values).tolist()
    return found


def mean_distance(x: Tensor, y: Tensor) -> float:
    """Mean absolute difference, in float32."""
    return _read(_distance(x, y))[0]


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.float() - y.float()).abs().mean()


def _size(x: Tensor) -> Tensor:
    return x.float().abs().mean()


def relative_change(x: Tensor, reference: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of `reference`; inf where that is zero."""
    distance, size = _read(_distance(x, reference), _size(reference))
    return distance / size if size else float("inf")


class Indicator(Protocol):
    """Measures change over the steps of one run, for one group of batch rows."""

    def change(self, x: Tensor) -> float | None:
        """Before a step with input `x`, once per step: the change since the last computed one, None if unknown."""

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        """The step with input `x` was computed and gave `output`."""


@dataclass
class InputChange:
    """Relative L1 change of the site's input against the last computed step (First-Block Cache's probe)."""

    reference: Tensor | None = None

    def change(self, x: Tensor) -> float | None:
        return None if self.reference is None else relative_change(x, self.reference)

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        self.reference = x


@dataclass
class TransformRate:
    """Estimated relative L1 change of the output, from the latents alone, summed step by step (EasyCache, 2507.02860).

    How fast the output moves per movement of the latents, `rate = |v_b - v_a| / |x_b - x_a|` over the last two computed
    steps a, b, is taken to hold on: each step adds `rate * |x - x_previous| / |v_b|`. Unlike the paper's code, both
    differences of the rate span the same two steps. Constant input channels (image conditions) cancel.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    previous: Tensor | None = None
    rate: float | None = None
    total: float = 0.0

    def change(self, x: Tensor) -> float | None:
        moved = None if self.previous is None or self.rate is None else mean_distance(x, self.previous)
        self.previous = x.detach().clone()  # schedulers may update latents in place
        if moved is None or self.rate is None:
            return None
        self.total += self.rate * moved
        return self.total

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        if output is None:
            return
        if self.input is not None and self.output is not None:
            pieces = _distance(x, self.input), _distance(output, self.output), _size(output)
            moved, turned, size = _read(*pieces)
            self.rate = turned / (moved * size) if moved and size else None
        self.input, self.output, self.total = x.detach().clone(), output, 0.0


@dataclass(frozen=True)
class Link:
    """A fitted polynomial (highest power first) from one number to another, kept to what it was fitted on.

    The argument is clamped to `low..high` and the value to 0 and above: outside its data a polynomial of degree 4 says
    anything, and a negative change would pay back changes already summed.
    """

    coefficients: tuple[float, ...]
    low: float = 0.0
    high: float = float("inf")

    def __call__(self, x: float) -> float:
        at, total = min(max(x, self.low), self.high), 0.0
        for c in self.coefficients:
            total = total * at + c
        return max(total, 0.0)


@dataclass
class Accumulated:
    """Relative L1 changes from each step to the next, each through `link`, summed since the last computed step
    (TeaCache, arXiv 2411.19108)."""

    link: Callable[[float], float] = float
    previous: Tensor | None = None
    total: float = 0.0

    def change(self, x: Tensor) -> float | None:
        step = None if self.previous is None else relative_change(x, self.previous)
        self.previous = x.detach().clone()
        if step is None:
            return None
        self.total += self.link(step)
        return self.total

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        self.total = 0.0


@dataclass
class Drift:
    """Relative L1 change of outputs [outputs, ...] between the last two computed steps, averaged over the outputs: it
    lags, and costs nothing at a predicted step (BWCache, arXiv 2509.13789)."""

    output: Tensor | None = None
    drift: float | None = None

    def change(self, x: Tensor) -> float | None:
        return self.drift

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        if output is None:
            return
        if self.output is not None:
            (self.drift,) = _read(_mean_drift(output.float(), self.output.float()))
        self.output = output


def _mean_drift(new: Tensor, old: Tensor) -> Tensor:
    """inf where an old output was zero throughout."""
    return ((new - old).abs().flatten(1).mean(1) / old.abs().flatten(1).mean(1)).mean()
