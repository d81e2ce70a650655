"""Multistep predictors: what they are exact on, what they equal, and FoCa step by step."""

from __future__ import annotations

import numpy as np
import pytest

from diffeff.methods.caching.multistep import BDF, AdamsBashforth, FoCa
from diffeff.methods.caching.predictor import Polynomial, Predictor, Taylor

TIMES = (1.0, 0.9, 0.72, 0.6)
STEPS = (0.0, 5.0, 10.0)


def error(predictor: Predictor, degree: int, times: tuple[float, ...] = TIMES, t: float = 0.35) -> float:
    """How far off it is on the power of this degree."""
    used = np.array(times[-predictor.snapshots :])
    return float(np.dot(predictor.coefficients(list(used), t), used**degree) - t**degree)


@pytest.mark.parametrize("make", [AdamsBashforth, BDF])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_formulas_are_exact_up_to_quadratics(make: type[AdamsBashforth | BDF], order: int) -> None:
    predictor = make(order)
    exact = min(order, 2)
    assert [error(predictor, degree) for degree in range(exact + 1)] == pytest.approx([0.0] * (exact + 1), abs=1e-12)
    assert abs(error(predictor, exact + 1)) > 1e-3


@pytest.mark.parametrize("make", [AdamsBashforth, BDF])
def test_with_full_exactness_they_are_the_polynomial(make: type[AdamsBashforth | BDF]) -> None:
    for order in (1, 2):
        expected = Polynomial(order).coefficients(TIMES[-order - 1 :], 0.35)
        assert make(order).coefficients(TIMES[-order - 1 :], 0.35) == pytest.approx(expected)
    three, cubic = (np.abs(p.coefficients(TIMES, 0.35)).sum() for p in (make(3), Polynomial(3)))
    assert three < cubic


def test_adams_bashforth_with_slopes_at_the_newer_end_is_the_published_taylor() -> None:
    """3/2 and -1/2 of the last two slopes over one gap, and in general the slope's line integrated."""
    weights = np.zeros(3)
    slopes = np.array([[-0.2, 0.2, 0.0], [0.0, -0.2, 0.2]])
    k = 4.0
    weights[-1] = 1
    weights += k * slopes[1] + k * k / 2 * (slopes[1] - slopes[0]) / 5
    assert Taylor(2).coefficients(STEPS, 14.0) == pytest.approx(tuple(weights))


def test_foca_continues_lines_and_averages_slopes() -> None:
    """Anchors 0, 1, 4 at steps 0, 5, 10: what was predicted for step 9 is 1.8, so the last slope is 2.2 and the one
    between anchors 0.6."""
    assert FoCa().coefficients([0.0, 5.0], 8.0) == pytest.approx((-0.6, 1.6))
    values = np.array([0.0, 1.0, 4.0])
    predicted = [float(np.dot(FoCa().coefficients(STEPS, t), values)) for t in (11.0, 12.0)]
    first = (2.2 + 0.6) / 2
    assert predicted == pytest.approx([4 + first, 4 + first + (first + 0.6) / 2])


def test_foca_is_exact_on_lines_whatever_the_gaps() -> None:
    for times in ((3.0, 4.0, 9.0), (0.0, 5.0, 6.0), (1.0, 2.0, 3.0)):
        assert error(FoCa(), 1, times, times[-1] + 3) == pytest.approx(0.0, abs=1e-12)
        assert error(FoCa(), 0, times, times[-1] + 3) == pytest.approx(0.0, abs=1e-12)
