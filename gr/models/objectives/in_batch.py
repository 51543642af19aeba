"""In-batch softmax, corrected for popularity: the targets of the whole global batch are everyone's candidates.

    loss = log(exp c_y + sum_{g: r_g != y} exp c_g) - c_y,    c_i = s_i - log p_i

p_i, the share of item i in the training targets, is the probability that it turns up as a candidate (Yi et al.,
RecSys 2019, "Sampling-bias-corrected neural modeling", eq. 3: the correction lowers the target's score too).
Candidates equal to the target are masked, so that it counts once; with ``outside: sequence`` all that stand in the
target's own sequence are (IDvs.MoRec, SIGIR 2023).

Shapes: S targets, G targets of the global batch, I catalogue size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gr.config import ComponentConfig
from gr.embeddings.table import Table
from gr.models.model import Catalogue
from gr.models.objectives.histories import Histories
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
        """logq: correct for popularity; without it the plain in-batch softmax.  outside: what a target's candidates
        are not, the target alone or anything in its sequence, inputs and targets."""

        name: Literal["in_batch"] = "in_batch"
        logq: bool = True
        outside: Literal["target", "sequence"] = "target"

    @staticmethod
    def counts_items(config: InBatchDebiased.Config) -> bool:
        return config.logq

    @staticmethod
    def scored(config: Any, targets: int, items: int) -> int:
        return min(targets, items)

    def __init__(self, config: Config, similarity: Similarity, catalogue: Catalogue) -> None:
        super().__init__(similarity)
        self.config, self.items = config, catalogue.rows
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
        if self.config.outside == "sequence":
            if counts is None:
                candidates, counts = candidates.unique(return_counts=True)
            return self._outside(similarity, queries_SD, part, step, candidates, counts)
        return similarity.sampled_softmax(
            step.views["items"], queries_SD, part.targets_S, candidates, -self.log_p_I, counts
        )

    def _outside(
        self,
        similarity: Similarity,
        queries_SD: Tensor,
        part: Supervision,
        step: StepContext,
        candidates_C: Tensor,
        counts_C: Tensor,
    ) -> Tensor:
        """The same sum over distinct candidates, those of each target's sequence masked; (S, C) scores exist at
        once."""
        histories, view = Histories(part, self.items), step.views["items"]
        scores_SC = similarity.shared(view, queries_SD, candidates_C) - self.log_p_I[candidates_C]
        own_S1 = similarity.candidates(view, queries_SD, part.targets_S[:, None])
        own_S1 = own_S1 - self.log_p_I[part.targets_S][:, None]
        masked_SC = histories.columns(candidates_C)[histories.sequences_S] | (counts_C == 0)
        others_SC = (scores_SC + counts_C.clamp_min(1).log()).masked_fill(masked_SC, -torch.inf)
        return (torch.logsumexp(torch.cat([own_S1, others_SC], dim=1), dim=1) - own_S1[:, 0]).sum()

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
