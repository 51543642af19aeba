"""What every objective is: a loss with its candidates, summed over the targets of a micro-batch.

Shapes: S targets, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gr.embeddings.table import Table
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class Objective(nn.Module):
    """``needs_global_targets``: whether the targets of the whole global batch must stand in the step's context."""

    needs_global_targets = False
    needs_every_row = False
    """Whether every row of the table has a gradient in every step: ``Table.cross_entropy``."""

    @staticmethod
    def counts_items(config: Any) -> bool:
        """Whether it asks beforehand how often each item is a training action."""
        return getattr(config, "sampling", "uniform") == "popularity"

    @staticmethod
    def reads_sequences(config: Any) -> bool:
        """Whether a target's loss depends on what else stands in its sequence, which then has to be there whole."""
        return getattr(config, "outside", "target") == "sequence"

    @staticmethod
    def scored(config: Any, targets: int, items: int) -> int:
        """How many items a query is scored against in a step of so many targets, the catalogue being ``items``: what
        the loss costs (gr.scaling.flops)."""
        return 1 + config.negatives

    def __init__(self, similarity: Similarity) -> None:
        super().__init__()
        self.similarity = similarity

    def forward(self, queries_SD: Tensor, part: Supervision, step: StepContext, items: Table) -> Tensor:
        """The sum of the losses of the S targets, a float32 scalar: with nested prefixes the mean over these and the
        whole, all with the same candidates."""
        nested = self.similarity.nested
        if not nested:
            return self.summed(self.similarity, queries_SD, part, step, items)
        sums = []
        for similarity in (self.similarity, *nested):
            again = replace(step, drawn=dict(step.drawn))  # each takes what was drawn
            sums.append(self.summed(similarity, queries_SD, part, again, items))
        step.drawn.pop(id(part), None)
        return torch.stack(sums).mean()

    @abstractmethod
    def summed(
        self,
        similarity: Similarity,
        queries_SD: Tensor,
        part: Supervision,
        step: StepContext,
        items: Table,
    ) -> Tensor:
        """The sum of the losses of the S targets by a similarity.  Rows are looked at through the step's view of
        ``items``, the whole catalogue through the table itself."""

    @abstractmethod
    def wanted(self, part: Supervision, step: StepContext) -> list[Tensor]:
        """Rows of the items that ``forward`` will look at through the view: known before it, since draws are
        functions of counters."""
