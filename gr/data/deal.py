"""Dealing the samples of a global batch to ranks so that no rank waits long for another."""

from __future__ import annotations

import numpy as np

LINEAR, QUADRATIC = 1.0, 0.005


def cost(lengths: np.ndarray) -> np.ndarray:
    """(G,) float64: what samples of so many actions cost, LINEAR * n + QUADRATIC * n^2 (linear layers, attention)."""
    return LINEAR * lengths + QUADRATIC * lengths.astype(np.float64) ** 2


def deal(lengths: np.ndarray, ranks: int) -> np.ndarray:
    """(G,) rank of each sample.

    Longest first, ``ranks`` at a time, the longest of each handful to the rank with the least :func:`cost` so far.
    Counts differ by at most one; a pure function of its arguments.
    """
    if ranks == 1:
        return np.zeros(len(lengths), np.int64)
    costs = cost(lengths)
    longest_first = np.lexsort((np.arange(len(lengths)), -costs))
    descending = costs[longest_first].tolist()
    load, dealt = [0.0] * ranks, []
    for start in range(0, len(descending), ranks):
        least_loaded = sorted(range(ranks), key=load.__getitem__)
        for rank, more in zip(least_loaded, descending[start : start + ranks]):
            load[rank] += more
            dealt.append(rank)
    rank_of = np.empty(len(lengths), dtype=np.int64)
    rank_of[longest_first] = dealt
    return rank_of


def skew(lengths: np.ndarray, rank_of: np.ndarray, ranks: int) -> float:
    """The cost of the heaviest rank over the mean of all: the time of a step over that of a level one."""
    load = np.bincount(rank_of, weights=cost(lengths), minlength=ranks)
    return float(load.max() / load.mean()) if load.any() else 1.0
