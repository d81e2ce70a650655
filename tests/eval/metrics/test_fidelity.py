"""Fidelity figures: known values, identity, refusal of other shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffeff.eval.metrics.fidelity import max_abs, psnr


def test_identical_arrays() -> None:
    frames = np.random.default_rng(0).random((3, 8, 8, 3), dtype=np.float32)
    assert math.isinf(psnr(frames, frames.copy()))
    assert max_abs(frames, frames.copy()) == 0


def test_a_constant_error_of_a_tenth_is_twenty_decibels() -> None:
    frames = np.zeros((2, 4, 4, 3), dtype=np.float32)
    assert psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-5)
    assert max_abs(frames, frames + 0.1) == pytest.approx(0.1)


def test_not_a_number_is_not_hidden() -> None:
    frames = np.zeros((1, 2, 2, 3), dtype=np.float32)
    broken = frames.copy()
    broken[0, 0, 0, 0] = np.nan
    assert math.isnan(psnr(frames, broken))


@pytest.mark.parametrize("measure", [psnr, max_abs])
def test_other_shapes_are_refused(measure: object) -> None:
    with pytest.raises(ValueError, match="one shape"):
        measure(np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 2, 3)))  # type: ignore[operator]
