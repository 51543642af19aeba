"""Distributions of sequence lengths that benchmarks share."""

from __future__ import annotations

import numpy as np

# Actions of a user in MovieLens-1M: every twentieth of the 6,040 users, from the fewest to the most.
ML_1M_LENGTHS = (
    *(20, 23, 27, 32, 38, 44, 51, 60, 70, 81, 96),
    *(109, 126, 148, 173, 208, 253, 309, 400, 556, 2314),
)
# Amazon Books after its filters: at least 5 actions, a mean near 14.5 and a heavy tail.
BOOKS_LEAST, BOOKS_TAIL, BOOKS_MOST = 5, 1.45, 10_000


def ml_1m(uniform_R: np.ndarray) -> np.ndarray:
    """Actions of users with MovieLens-1M's lengths: float (R,) of uniform draws in [0, 1) to int64 (R,)."""
    quantiles = np.linspace(0, 1, len(ML_1M_LENGTHS))
    return np.exp(np.interp(uniform_R, quantiles, np.log(ML_1M_LENGTHS))).astype(np.int64)


def books(uniform_R: np.ndarray) -> np.ndarray:
    """The same for Amazon Books."""
    lengths_R = BOOKS_LEAST * (1 - uniform_R) ** (-1 / BOOKS_TAIL)
    return np.minimum(lengths_R, BOOKS_MOST).astype(np.int64)
