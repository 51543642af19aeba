"""Examples at the ends of sessions (Zhai et al., arXiv 2402.17152, section 3.3: generative training).

A streaming trainer that emits an example at the end of each session emits one of n actions with a rate of about 1 / n
an action.  Here every user gives one example an epoch: what was known at the end of one of their sessions, each
with the same probability.

Shapes: R rows, A actions of all rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from gr.config import POSITIVE, ComponentConfig
from gr.data.sequences import TIME, Sequences
from gr.data.transforms.transform import Draws, Sampler


class SessionEnds(Sampler):
    """A session ends where the next action comes more than ``gap`` seconds later, and with the sequence; the end of a
    first session of one action is passed over, for it has no input."""

    class Config(ComponentConfig):
        name: Literal["session_ends"] = "session_ends"
        gap: POSITIVE = 1800

    config: Config
    needs = frozenset({TIME})
    whole = True

    def apply(self, rows: Sequences, draws: Draws, max_length: int) -> Sequences:
        times_A = rows.timestamps_A
        assert times_A is not None
        ends_A = np.zeros(len(times_A), bool)
        ends_A[:-1] = times_A[1:] - times_A[:-1] > self.config.gap
        ends_A[rows.offsets_R1[1:][rows.lengths_R > 0] - 1] = True
        ends_A &= rows.places_A > 0
        ends = np.flatnonzero(ends_A)
        first_R = np.searchsorted(ends, rows.offsets_R1)
        count_R = np.diff(first_R)
        chosen_R = first_R[:-1] + np.minimum((draws.a_row(rows) * count_R).astype(np.int64), count_R - 1)
        some_R = count_R > 0
        stop_R = rows.lengths_R.copy()
        stop_R[some_R] = rows.places_A[ends[chosen_R[some_R]]] + 1
        return rows.take(np.arange(len(rows)), stop=stop_R)
