"""Predictors against the functions they are exact on, and against figures of the published forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffeff.core.config import knobs
from diffeff.methods import FeatureCache
from diffeff.methods.caching.grouped import GROUPED
from diffeff.methods.caching.predictor import (
    PREDICTORS,
    Chebyshev,
    Damped,
    Hermite,
    Polynomial,
    Predictor,
    Taylor,
    combine,
)

ALL = {**PREDICTORS, **GROUPED}
TIMES = (1.0, 0.9, 0.72, 0.6)
STEPS = (0.0, 5.0, 10.0)


def predict(predictor: Predictor, times: tuple[float, ...], values: np.ndarray, t: float) -> float:
    return float(np.dot(predictor.coefficients(times, t), values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hold_and_linear_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(6, dtype=dtype).reshape(2, 3)
    held = combine([x], Polynomial(0).coefficients([1.0], 0.3))
    assert torch.equal(held, x)
    assert held is not x
    assert held.dtype is dtype
    times, t = [1.0, 0.75], 0.25
    line = [2 * x + s * (x - 1) for s in (*times, t)]
    assert torch.equal(combine(line[:2], Polynomial(1).coefficients(times, t)), line[2])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_polynomials_are_exact_up_to_their_order(order: int) -> None:
    known = np.polynomial.Polynomial(np.arange(1.0, order + 2))
    found = predict(Polynomial(order), TIMES, known(np.array(TIMES)), 0.35)
    assert found == pytest.approx(known(0.35), rel=1e-12)
    higher = np.polynomial.Polynomial([0.0] * (order + 1) + [1.0])
    assert abs(predict(Polynomial(order), TIMES, higher(np.array(TIMES)), 0.35) - higher(0.35)) > 1e-3


def test_snapshots_that_are_missing_lower_the_order_and_older_ones_count_nothing() -> None:
    assert Polynomial(2).coefficients([1.0], 0.5) == (1.0,)
    assert Polynomial(3).coefficients(TIMES[:2], 0.5) == Polynomial(1).coefficients(TIMES[:2], 0.5)
    assert Polynomial(1).coefficients(TIMES, 0.5)[:2] == (0.0, 0.0)


@pytest.mark.parametrize("name", sorted(PREDICTORS))
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_constants_are_exact_for_every_predictor(name: str, length: int) -> None:
    weights = PREDICTORS[name].coefficients(TIMES[:length], 0.3)
    assert len(weights) == length
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)


def test_taylor_is_the_published_form_and_misses_quadratics() -> None:
    """Anchors five steps apart, four steps ahead: off by 20 on k squared, with a lower gain than the exact form."""
    square = np.square(STEPS)
    assert predict(Taylor(2), STEPS, square, 14.0) == pytest.approx(14.0**2 - 20)
    assert predict(Polynomial(2), STEPS, square, 14.0) == pytest.approx(14.0**2)
    gains = [np.abs(p.coefficients(STEPS, 14.0)).sum() for p in (Taylor(2), Polynomial(2))]
    assert gains == pytest.approx([3.88, 5.48], abs=0.01)
    line = 3 + 2 * np.array(STEPS)
    assert predict(Taylor(2), STEPS, line, 14.0) == pytest.approx(31.0)


def test_hermite_halves_the_slope_at_its_default_scale() -> None:
    """y0 + k D1 / 2 + (k^2 - 2) D2 / 8."""
    y = np.array([0.0, 1.0, 4.0])
    d1, d2, k = 3 / 5, (3 / 5 - 1 / 5) / 5, 4.0
    assert predict(Hermite(2, 0.5), STEPS, y, 14.0) == pytest.approx(4 + k * d1 / 2 + (k * k - 2) * d2 / 8)


def test_chebyshev_is_a_ridge_fit_of_moves_from_the_newest() -> None:
    free = Chebyshev(order=1, ridge=0.0, window=4)
    line = 5 - 3 * np.array(TIMES)
    assert predict(free, TIMES, line, 0.4) == pytest.approx(5 - 3 * 0.4)
    stiff = Chebyshev(order=1, ridge=1e9, window=4)
    assert predict(stiff, TIMES, line, 0.4) == pytest.approx(line[-1])


def test_damped_lies_between_hold_and_its_inner_predictor() -> None:
    assert Damped(Polynomial(1), 0.5).coefficients(STEPS, 15.0) == pytest.approx((0.0, -0.5, 1.5))
    assert Damped(Polynomial(1), 0.0).coefficients(STEPS, 15.0) == pytest.approx((0.0, 0.0, 1.0))


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_name_of_the_option_is_its_predictor(name: str) -> None:
    assert FeatureCache(predictor=name).recipe().predictor == ALL[name]


def test_axis_moves_polynomials_and_leaves_published_forms() -> None:
    assert FeatureCache(predictor="quadratic", axis="index").recipe().predictor == Polynomial(2, "index")
    assert FeatureCache(predictor="damped", axis="index").recipe().predictor.axis == "index"
    assert FeatureCache(predictor="taylor", axis="time").recipe().predictor.axis == "index"
    assert FeatureCache(predictor="chebyshev", axis="index").recipe().predictor.axis == "time"


def test_the_option_lists_every_predictor() -> None:
    (spec,) = [k for k in knobs(FeatureCache) if k.name == "predictor"]
    assert set(spec.choices) == set(ALL)
