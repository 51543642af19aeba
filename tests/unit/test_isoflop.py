"""Curves of equal compute: what they are fitted to is found again; what has no lowest point has no valley."""

from __future__ import annotations

import numpy as np
import pytest

from gr.scaling.isoflop import best_size, valley

SIZES = np.array([1e3, 3e3, 1e4, 4e4])


def losses(compute: float, k: float = 2.0, a: float = 0.4, curvature: float = 0.03) -> np.ndarray:
    return 50 * compute**-0.1 * np.exp(curvature * np.log(SIZES / (k * compute**a)) ** 2)


def test_a_parabola_and_the_growth_of_the_best_size_are_found_again():
    budgets = [1e8, 1e9, 1e10]
    found = [valley(compute, SIZES, losses(compute)) for compute in budgets]
    for compute, curve in zip(budgets, found, strict=True):
        assert curve is not None
        assert curve.parameters == pytest.approx(2 * compute**0.4, rel=1e-6)
        assert curve.loss == pytest.approx(50 * compute**-0.1, rel=1e-6)
        assert curve.curvature == pytest.approx(0.03, rel=1e-6)
        assert curve.at(SIZES) == pytest.approx(losses(compute), rel=1e-6)
        assert curve.inside == (1e3 <= 2 * compute**0.4 <= 4e4)
    k, a = best_size([curve for curve in found if curve])
    assert (k, a) == pytest.approx((2.0, 0.4), rel=1e-5)


def test_what_has_no_lowest_point():
    assert valley(1e9, SIZES[:2], losses(1e9)[:2]) is None
    assert valley(1e9, [1e3, 1e3, 1e4], losses(1e9)[:3]) is None
    assert valley(1e9, SIZES, losses(1e9, curvature=-0.03)) is None
    beyond = valley(1e12, SIZES, losses(1e12))
    assert beyond is not None and not beyond.inside and beyond.parameters > SIZES[-1]
    assert best_size([beyond] * 3) is None
