"""Stochastic Length (Zhai et al., arXiv 2402.17152, section 3.3): long sequences are mostly trained on in part.

With N = data.max_length, a sequence of n inputs stays whole where n <= N^(alpha/2).  A longer one stays whole with
probability N^alpha / n^2; else N^(alpha/2) of its inputs are chosen, rounded down, and keep their order.  So attention
costs N^alpha a sequence on average, not N^2.

Shapes: R rows, A actions of all rows.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from gr.batch import TARGETS_FROM
from gr.config import ComponentConfig
from gr.data.sequences import TIME, Sequences, latest
from gr.data.transforms.transform import Draws, Sampler


class StochasticLength(Sampler):
    """The last action, which is the last target, always stays, as do all targets where a sequence says which they are.
    Every other action that stays has the next one that stays as its target."""

    class Config(ComponentConfig):
        """select: which inputs stay: the latest (greedy), any with the same probability (random), or without
        replacement with weights 1 - f / sum of f, where f is the time between an input and the latest one (recency)."""

        name: Literal["stochastic_length"] = "stochastic_length"
        alpha: Annotated[float, Field(gt=1, le=2)] = 1.7
        select: Literal["greedy", "random", "recency"] = "recency"

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = frozenset({TIME} if config.select == "recency" else ())

    def apply(self, rows: Sequences, draws: Draws, max_length: int) -> Sequences:
        rows = latest(rows, max_length)
        short, whole = self.length(max_length), float(max_length) ** self.config.alpha
        inputs_R = np.maximum(rows.lengths_R - 1, 0)
        cut_R = (inputs_R > short) & (draws.a_row(rows) >= whole / np.maximum(inputs_R, 1) ** 2)
        if not cut_R.any():
            return rows
        # actions before this place may go; targets after it are inputs, too, and count among those that stay
        fixed_R = inputs_R if rows.targets_from_R is None else rows.targets_from_R
        stay_R = np.maximum(short - (inputs_R - fixed_R), 1)
        free_A = rows.places_A < fixed_R[rows.owner_A]
        kept_A = ~free_A | ~cut_R[rows.owner_A]
        kept_A[self._chosen(rows, draws, free_A & cut_R[rows.owner_A], stay_R)] = True
        kept = rows.keep(kept_A)
        if rows.targets_from_R is None:
            return kept
        left_R = np.bincount(rows.owner_A[kept_A & free_A], minlength=len(rows)).astype(np.int64)
        return kept.with_users(**{TARGETS_FROM: left_R})

    def length(self, max_length: int) -> int:
        """Inputs of a sequence that was cut."""
        return int(max_length ** (self.config.alpha / 2) + 1e-9)

    def _chosen(self, rows: Sequences, draws: Draws, free_A: np.ndarray, stay_R: np.ndarray) -> np.ndarray:
        """Places in the rows' columns: of each row's free actions the ``stay_R`` with the highest scores."""
        source = np.flatnonzero(free_A)
        owner = rows.owner_A[source]
        order = np.lexsort((-self._scores(rows, draws, free_A)[source], owner))
        source, owner = source[order], owner[order]
        rank = np.arange(len(source)) - np.searchsorted(owner, owner, "left")
        return source[rank < stay_R[owner]]

    def _scores(self, rows: Sequences, draws: Draws, free_A: np.ndarray) -> np.ndarray:
        if self.config.select == "greedy":
            return rows.places_A.astype(np.float64)
        uniform_A = draws.an_action(rows)
        if self.config.select == "random":
            return uniform_A
        # the k largest of log w + Gumbel noise are k draws without replacement with weights w (Efraimidis, Spirakis)
        owner_A, times_A = rows.owner_A, rows.timestamps_A
        assert times_A is not None
        free_R = np.bincount(owner_A[free_A], minlength=len(rows))  # they are a sequence's first ones
        newest_R = times_A[np.maximum(rows.offsets_R1[:-1] + free_R - 1, 0)]
        age_A = np.where(free_A, newest_R[owner_A] - times_A, 0).astype(np.float64)
        total_R = np.bincount(owner_A, weights=age_A, minlength=len(rows))
        share_A = age_A / np.where(total_R > 0, total_R, 1)[owner_A]
        with np.errstate(divide="ignore"):
            return np.log1p(-share_A) - np.log(-np.log(uniform_A))
