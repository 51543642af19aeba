"""Where the sequences of a jagged tensor begin and end, and when their actions happened.

Shapes: B sequences, T actions in the batch, N longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gr.models.cut import Cut
    from gr.models.memory import Memory


@dataclass(frozen=True)
class JaggedLayout:
    """The sequences of a (T, ...) tensor.

    offsets_B1: int64, first row of each sequence and the end of the last.  lengths: the same as Python integers.
    max_length: N.  query_times_T: int64 seconds, the time of the action that row i predicts (t_{i+1} when the next
    action is predicted).  key_times_T: the time of the action in row i.  Both None for data without times.
    dropout_key: 64 bits, from which every dropout of this micro-batch derives a key of its own.  cut: which rows these
    are of the sequences, where processes share them; then a sequence here is a stretch of one.  memory: where attention
    keeps what it is given, or finds it, where many candidates are scored against a history.
    """

    offsets_B1: Tensor
    lengths: tuple[int, ...]
    max_length: int
    query_times_T: Tensor | None = None
    key_times_T: Tensor | None = None
    dropout_key: int = 0
    cut: Cut | None = None
    memory: Memory | None = None

    @property
    def rows(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def sequences_T(self) -> Tensor:
        """int64: the number of the sequence that each row belongs to."""
        return sequence_of_rows(self.offsets_B1, self.rows)

    @cached_property
    def positions_T(self) -> Tensor:
        """int64: each row's place in its sequence, from 0."""
        if self.cut is not None:
            return self.cut.positions_T
        rows = torch.arange(self.rows, device=self.offsets_B1.device)
        return rows - self.offsets_B1[self.sequences_T]

    @cached_property
    def start_order_B(self) -> Tensor | None:
        """int64: the sequences from the longest on, the order in which a GPU should start them; None on CPU.

        Found once for all layers, and their backward passes.
        """
        if self.offsets_B1.device.type == "cpu":
            return None
        return self.offsets_B1.diff().argsort(descending=True, stable=True)


def sequence_of_rows(offsets_B1: Tensor, rows: int) -> Tensor:
    """int64 (rows,): the sequence of each row.  ``rows`` is known, so that no device is waited for."""
    numbers = torch.arange(offsets_B1.shape[0] - 1, device=offsets_B1.device)
    return torch.repeat_interleave(numbers, offsets_B1.diff(), output_size=rows)
