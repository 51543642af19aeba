"""Dealing the samples of a global batch to ranks so that no rank waits long for another."""

from __future__ import annotations

import numpy as np


def deal(lengths: np.ndarray, ranks: int, linear: float = 1.0, quadratic: float = 0.005) -> np.ndarray:
    """(G,) rank of each sample.

    Longest first, ``ranks`` at a time, the longest of each handful to the rank with the least cost so far
    (cost of a sample of n actions: linear*n + quadratic*n^2, linear layers and attention).  Counts differ by at
    most one; a pure function of its arguments.
    """
    cost = linear * lengths + quadratic * lengths.astype(np.float64) ** 2
    longest_first = np.lexsort((np.arange(len(lengths)), -cost))
    load = np.zeros(ranks)
    rank_of = np.empty(len(lengths), dtype=np.int64)
    for start in range(0, len(lengths), ranks):
        handful = longest_first[start : start + ranks]
        least_loaded = np.argsort(load, kind="stable")[: len(handful)]
        rank_of[handful] = least_loaded
        load[least_loaded] += cost[handful]
    return rank_of
