"""Which rows of every sequence a process has, where the processes of the context axis share each (``train.context``).

A sequence of n rows is cut into 2 C stretches for C processes, and process r has stretches r and 2 C - 1 - r: later
rows see more keys, and so everybody has the same work under the causal mask.  A stretch has a multiple of four rows
(but the last ones of a sequence, which may be short or empty), since dropout draws for four keys at a time.

A process's rows are the first stretch of every sequence, end to end, then the second of every sequence: to whatever
looks at each row alone they are a jagged tensor of twice as many sequences.  Every process knows all lengths, times and
tokens of the batch; what is as wide as the model it has for its own rows only.

Shapes: B sequences, T rows of this process, S rows of one stretch of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.models.layout import JaggedLayout, sequence_of_rows
from gr.processes import Axis

QUAD = 4


@dataclass(frozen=True)
class Stretch:
    """One stretch of every sequence.

    lengths: its rows of each, as Python integers.  offsets_B1: int64, the same as offsets.  starts_B: int64, where in
    its sequence it begins.  numbers_S: int64, the rows' numbers in the whole batch.
    """

    lengths: tuple[int, ...]
    offsets_B1: Tensor
    starts_B: Tensor
    numbers_S: Tensor

    @property
    def rows(self) -> int:
        """S."""
        return self.numbers_S.shape[0]


@dataclass(frozen=True)
class Cut:
    """``whole``: the layout of all rows.  ``axis``: the processes that share its sequences."""

    whole: JaggedLayout
    axis: Axis

    @cached_property
    def stretches(self) -> list[Stretch]:
        """All 2 C of them."""
        return [self._stretch(number) for number in range(2 * self.axis.size)]

    def numbers_of(self, rank: int) -> tuple[int, int]:
        """Which two stretches process ``rank`` has, first and second."""
        return rank, 2 * self.axis.size - 1 - rank

    def held_by(self, rank: int) -> tuple[Stretch, Stretch]:
        """The stretches of process ``rank``."""
        first, second = self.numbers_of(rank)
        return self.stretches[first], self.stretches[second]

    @cached_property
    def numbers_T(self) -> Tensor:
        """int64: the number in the whole batch of each row of this process."""
        return torch.cat([stretch.numbers_S for stretch in self.held_by(self.axis.rank)])

    @cached_property
    def positions_T(self) -> Tensor:
        """int64: the place in its sequence of each row of this process."""
        return torch.cat(
            [
                torch.arange(stretch.rows, device=stretch.offsets_B1.device)
                + (stretch.starts_B - stretch.offsets_B1[:-1])[
                    sequence_of_rows(stretch.offsets_B1, stretch.rows)
                ]
                for stretch in self.held_by(self.axis.rank)
            ]
        )

    def among(self, numbers_K: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows by their numbers in the whole batch, those that this process has: which they are, and as which of its
        own rows it has them, ascending.  Waits for a device."""
        own_T = self.numbers_T
        place_N = torch.full((self.whole.rows,), -1, device=own_T.device)
        place_N[own_T] = torch.arange(own_T.shape[0], device=own_T.device)
        chosen_K = (place_N[numbers_K] >= 0).nonzero().squeeze(1)
        places_K, order_K = place_N[numbers_K[chosen_K]].sort()
        return chosen_K[order_K], places_K

    @cached_property
    def key_times(self) -> list[Tensor | None]:
        """Of each stretch, the times of its rows' actions."""
        times = self.whole.key_times_T
        return [None if times is None else times[stretch.numbers_S] for stretch in self.stretches]

    def _stretch(self, number: int) -> Stretch:
        whole, parts = self.whole, 2 * self.axis.size
        lengths = []
        for n in whole.lengths:
            width = _width(n, parts)
            lengths.append(min((number + 1) * width, n) - min(number * width, n))
        # on the device the same from the offsets there, which nobody waits for
        n_B = whole.offsets_B1.diff()
        width_B = (n_B + (QUAD * parts - 1)) // (QUAD * parts) * QUAD
        starts_B = number * width_B
        counts_B = torch.minimum(starts_B + width_B, n_B) - torch.minimum(starts_B, n_B)
        offsets_B1 = F.pad(counts_B.cumsum(0), (1, 0))
        rows = sum(lengths)
        shift_B = whole.offsets_B1[:-1] + starts_B - offsets_B1[:-1]
        numbers_S = torch.arange(rows, device=offsets_B1.device) + shift_B[sequence_of_rows(offsets_B1, rows)]
        return Stretch(tuple(lengths), offsets_B1, starts_B, numbers_S)


def cut(whole: JaggedLayout, axis: Axis) -> JaggedLayout:
    """The layout of this process's rows of ``whole``."""
    made = Cut(whole, axis)
    first, second = made.held_by(axis.rank)
    lengths = first.lengths + second.lengths
    return replace(
        whole,
        offsets_B1=torch.cat([first.offsets_B1, first.offsets_B1[-1] + second.offsets_B1[1:]]),
        lengths=lengths,
        max_length=max(lengths, default=0),
        query_times_T=None if whole.query_times_T is None else whole.query_times_T[made.numbers_T],
        key_times_T=None if whole.key_times_T is None else whole.key_times_T[made.numbers_T],
        cut=made,
    )


def _width(rows: int, parts: int) -> int:
    """Rows of a stretch of a sequence, but for those at its end."""
    return -(-rows // (QUAD * parts)) * QUAD
