"""Spectrum: its windows grow as published, and constants come out whole."""

from __future__ import annotations

import numpy as np
import pytest
from patterns import our_run
from scripted import drive
from torch import Tensor

from diffeff.methods.caching.published.spectrum import Spectrum


def test_fourteen_of_fifty_steps_are_computed() -> None:
    config = Spectrum(site="step", last=0)
    seen = drive([config], lambda x, branch, i: x, steps=50, branches=("cond",))
    assert seen.computed["cond"] == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]


def published(times: np.ndarray, t: float, order: int = 4, ridge: float = 0.1) -> float:
    """Sum of the published fit's weights: what it predicts of a constant 1."""
    at = 2 * np.append(times, t) / 49 - 1  # of 50 steps
    basis = np.polynomial.chebyshev.chebvander(at, order)
    gram = basis[:-1].T @ basis[:-1] + ridge * np.eye(order + 1)
    return float((basis[-1] @ np.linalg.solve(gram, basis[:-1].T)).sum())


def test_the_published_fit_shrinks_a_constant_and_ours_keeps_it() -> None:
    assert 0.8 < published(np.array([0, 1, 2, 3, 4, 6, 8, 11, 15, 20.0]), 24.0) < 0.9
    seen = drive([Spectrum(site="step")], lambda x, branch, i: x * 0 + 7.0, steps=30)
    for outputs in seen.outputs.values():
        assert all(float(y.max()) == pytest.approx(7.0, abs=1e-4) for y in outputs.values())


def test_a_line_is_followed_better_than_held() -> None:
    def line(x: Tensor, branch: str, i: int) -> Tensor:
        return x * 0 + i

    seen = drive([Spectrum(site="step")], line, steps=30, branches=("cond",))
    skipped = sorted(set(range(30)) - set(seen.computed["cond"]))
    errors = [abs(float(seen.outputs["cond"][i].max()) - i) for i in skipped]
    held = [i - max(j for j in seen.computed["cond"] if j < i) for i in skipped]
    assert np.mean(errors) < np.mean(held)


def test_the_stack_of_a_real_model() -> None:
    skipped, _ = our_run("flux", Spectrum(), 16)
    assert skipped == [5, 7, 9, 10, 12, 13, 14]
