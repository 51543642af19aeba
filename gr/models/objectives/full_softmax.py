"""Full softmax: the cross-entropy of the target against the whole catalogue, a chunk of scores at a time.

Shapes: S targets, D model width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from gr.config import ComponentConfig
from gr.models.borrow import borrow
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class FullSoftmax(nn.Module):
    similarity: Similarity
    needs_global_targets = False

    class Config(ComponentConfig):
        name: Literal["full_softmax"] = "full_softmax"

    def __init__(self, config: Config, similarity: Similarity, items: int, item_counts: Tensor) -> None:
        super().__init__()
        borrow(self, "similarity", similarity)

    def forward(self, queries_SD: Tensor, supervision: Supervision, step: StepContext) -> Tensor:
        """The sum of the losses of the S targets: a float32 scalar."""
        return self.similarity.cross_entropy(queries_SD, supervision.targets_S)
