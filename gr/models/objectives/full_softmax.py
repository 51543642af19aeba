"""Full softmax: the cross-entropy of the target against the whole catalogue, a chunk of scores at a time.

Shapes: S targets, D model width.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from gr.config import ComponentConfig
from gr.embeddings.table import Table
from gr.models.model import Catalogue
from gr.models.objectives.objective import Objective
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class FullSoftmax(Objective):
    needs_every_row = True

    class Config(ComponentConfig):
        name: Literal["full_softmax"] = "full_softmax"

    @staticmethod
    def scored(config: Any, targets: int, items: int) -> int:
        return items

    def __init__(self, config: Config, similarity: Similarity, catalogue: Catalogue) -> None:
        super().__init__(similarity)

    def summed(
        self,
        similarity: Similarity,
        queries_SD: Tensor,
        part: Supervision,
        step: StepContext,
        items: Table,
    ) -> Tensor:
        return similarity.cross_entropy(items, queries_SD, part.targets_S)

    def wanted(self, part: Supervision, step: StepContext) -> list[Tensor]:
        """None: the loss is formed where the table is."""
        return []
