"""How much has changed since the last computed step: one number from tensors that are at hand before computing.

Each call reads one number back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Indicator", "InputChange", "TransformRate", "mean_distance", "relative_change"]


def mean_distance(x: Tensor, y: Tensor) -> float:
    """Mean absolute difference, in float32."""
    return float((x.float() - y.float()).abs().mean())


def relative_change(x: Tensor, reference: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of `reference`; inf where that is zero."""
    size = float(reference.float().abs().mean())
    return mean_distance(x, reference) / size if size else float("inf")


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
        moved = None if self.previous is None else mean_distance(x, self.previous)
        self.previous = x.detach().clone()  # schedulers may update latents in place
        if moved is None or self.rate is None:
            return None
        self.total += self.rate * moved
        return self.total

    def computed(self, x: Tensor, output: Tensor | None) -> None:
        if output is None:
            return
        if self.input is not None and self.output is not None:
            moved, size = mean_distance(x, self.input), float(output.float().abs().mean())
            self.rate = mean_distance(output, self.output) / (moved * size) if moved and size else None
        self.input, self.output, self.total = x.detach().clone(), output, 0.0
