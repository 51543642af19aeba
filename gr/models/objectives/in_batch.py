"""In-batch softmax, corrected for popularity: the targets of the whole global batch are everyone's candidates.

    loss = log(exp c_y + sum_{g: r_g != y} exp c_g) - c_y,    c_i = s_i - log p_i

p_i, the share of item i in the training targets, is the probability that it turns up as a candidate (Yi et al.,
RecSys 2019, "Sampling-bias-corrected neural modeling", eq. 3: the correction lowers the target's score too).
Candidates equal to the target are masked, so that it counts once.

Shapes: S targets, G targets of the global batch, I catalogue size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gr.config import ComponentConfig
from gr.embeddings.table import Table
from gr.models.model import Catalogue
from gr.models.objectives.negatives import popularity
from gr.models.objectives.objective import Objective
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision
from gr_kernels.tracing import with_numbers


class InBatchDebiased(Objective):
    needs_global_targets = True
    log_p_I: Tensor

    class Config(ComponentConfig):
        """logq: correct for popularity; without it the plain in-batch softmax."""

        name: Literal["in_batch"] = "in_batch"
        logq: bool = True

    @staticmethod
    def counts_items(config: InBatchDebiased.Config) -> bool:
        return config.logq

    @staticmethod
    def scored(config: Any, targets: int, items: int) -> int:
        return min(targets, items)

    def __init__(self, config: Config, similarity: Similarity, catalogue: Catalogue) -> None:
        super().__init__(similarity)
        self.items = catalogue.rows
        with with_numbers():
            log_p_I = (
                popularity(catalogue.training_counts)[1].log() if config.logq else torch.zeros(self.items)
            )
        self.register_buffer("log_p_I", log_p_I, persistent=False)

    def summed(
        self,
        similarity: Similarity,
        queries_SD: Tensor,
        part: Supervision,
        step: StepContext,
        items: Table,
    ) -> Tensor:
        candidates, counts = self._candidates(step), None
        if len(candidates) > self.items:
            # each item stands once, with its occurrences: the same sum in fewer scores
            counts = torch.zeros(self.items, dtype=torch.int64, device=candidates.device)
            counts.index_add_(0, candidates, torch.ones_like(candidates))
            candidates = torch.arange(self.items, device=candidates.device)
        return similarity.sampled_softmax(
            step.views["items"], queries_SD, part.targets_S, candidates, -self.log_p_I, counts
        )

    def wanted(self, part: Supervision, step: StepContext) -> list[Tensor]:
        candidates = self._candidates(step)
        if len(candidates) > self.items:
            return [torch.arange(self.items, device=candidates.device)]
        return [part.targets_S, candidates]

    @staticmethod
    def _candidates(step: StepContext) -> Tensor:
        if step.candidates_G is None:
            raise ValueError("in_batch needs StepContext.candidates_G: the targets of the global batch")
        return step.candidates_G
