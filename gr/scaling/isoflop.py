"""Curves of equal compute: at one budget the loss falls with a model's size while it is too small, and rises again
where too little of the budget is left for data (Hoffmann et al., arXiv 2203.15556, approach 2).

    log L = log L* + c (log N - log N*)^2       at each budget
    N*    = k C^a                               over the budgets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Valley:
    """A budget's parabola.  parameters, loss: N* and L*, its lowest point.  sizes: the least and the largest N that
    were trained."""

    compute: float
    parameters: float
    loss: float
    curvature: float
    sizes: tuple[float, float]

    @property
    def inside(self) -> bool:
        """Whether the lowest point lies among the sizes that were trained, and not beyond them."""
        return self.sizes[0] <= self.parameters <= self.sizes[1]

    def at(self, parameters: Array) -> Array:
        return self.loss * np.exp(self.curvature * np.log(parameters / self.parameters) ** 2)


def valley(compute: float, parameters: Sequence[float], losses: Sequence[float]) -> Valley | None:
    """The parabola of a budget by least squares; None where fewer than three sizes were trained, or it has no lowest
    point."""
    log_n, log_loss = np.log(np.asarray(parameters, float)), np.log(np.asarray(losses, float))
    if len(np.unique(log_n)) < 3:
        return None
    centre = log_n.mean()
    c, slope, height = np.polyfit(log_n - centre, log_loss, 2)
    if c <= 0:
        return None
    lowest = -slope / (2 * c)
    sizes = (float(np.exp(log_n.min())), float(np.exp(log_n.max())))
    best, loss = float(np.exp(centre + lowest)), float(np.exp(height - slope**2 / (4 * c)))
    return Valley(compute, best, loss, float(c), sizes)


def best_size(valleys: Sequence[Valley]) -> tuple[float, float] | None:
    """(k, a) of N* = k C^a over the valleys whose lowest points lie inside; None where there are fewer than three."""
    inside = [v for v in valleys if v.inside]
    if len(inside) < 3:
        return None
    a, log_k = np.polyfit(np.log([v.compute for v in inside]), np.log([v.parameters for v in inside]), 1)
    return float(np.exp(log_k)), float(a)
