"""Which items stand in a target's own sequence: as negatives they would be told to be wrong where they were right.

Shapes: S targets, K candidates of a target, C of all, T input rows of the micro-batch, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr.models.tasks import MASK, Supervision


class Histories:
    """The items of each sequence of a micro-batch, inputs and targets; ``items``: I."""

    def __init__(self, part: Supervision, items: int) -> None:
        layout = part.layout
        self.items, self.sequences = items, len(layout.lengths)
        of_rows_T = layout.sequences_T
        self.sequences_S = of_rows_T if part.queries_S is None else of_rows_T[part.queries_S]
        shown_T = part.tokens_T.clamp_min(0)
        own_T = of_rows_T * items + shown_T
        # a hidden one stands for its target, which is there anyway
        of_targets_S = self.sequences_S * items + part.targets_S
        hidden_T = part.tokens_T == MASK
        if len(of_targets_S):
            own_T = torch.where(hidden_T, of_targets_S[:1], own_T)
        self.pairs = torch.cat([own_T, of_targets_S]).unique()
        """sequence * I + item, ascending."""

    def have(self, rows_SK: Tensor) -> Tensor:
        """(S, K) whether each of a target's candidates stands in its sequence."""
        return self._has(self.sequences_S[:, None] * self.items + rows_SK.long())

    def columns(self, candidates_C: Tensor) -> Tensor:
        """(B, C) whether each candidate stands in each sequence."""
        numbers_B = torch.arange(self.sequences, device=candidates_C.device)
        return self._has(numbers_B[:, None] * self.items + candidates_C.long())

    def _has(self, pairs: Tensor) -> Tensor:
        if not len(self.pairs):
            return torch.zeros_like(pairs, dtype=torch.bool)
        place = torch.searchsorted(self.pairs, pairs).clamp_max(len(self.pairs) - 1)
        return self.pairs[place] == pairs
