"""Sampled softmax: the cross-entropy of the target among itself and K sampled negatives.

    loss = log(exp s_y + sum_k [r_k != y] exp s_k) - s_y

A negative equal to the target is masked.  With ``logq`` every score, the target's too, is first lowered by the
log of the probability of drawing its item, which makes the sampled softmax an estimate of the full one (Bengio and
Senecal 2008; Jean et al., arXiv 1412.2007).

Shapes: S targets, K negatives, D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import POSITIVE, ComponentConfig
from gr.models.borrow import borrow
from gr.models.objectives.first_of_row import cross_entropy_of_first
from gr.models.objectives.negatives import NegativeSampler
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class SampledSoftmax(nn.Module):
    similarity: Similarity
    needs_global_targets = False

    class Config(ComponentConfig):
        """negatives: K, drawn with replacement, for each target or (``shared``) once a step for the global batch.
        logq: subtract from each item's logit the logarithm of its chance to be drawn (with uniform sampling one
        constant for all, which cancels)."""

        name: Literal["sampled_softmax"] = "sampled_softmax"
        negatives: POSITIVE = 128
        shared: bool = False
        sampling: Literal["uniform", "popularity"] = "uniform"
        logq: bool = False

    def __init__(self, config: Config, similarity: Similarity, items: int, item_counts: Tensor) -> None:
        super().__init__()
        self.config = config
        borrow(self, "similarity", similarity)
        self.sampler = NegativeSampler(config.sampling, items, item_counts)

    def forward(self, queries_SD: Tensor, supervision: Supervision, step: StepContext) -> Tensor:
        """The sum of the losses of the S targets: a float32 scalar."""
        if self.config.shared:
            return self._shared(queries_SD, supervision, step)
        rows = self.sampler.own(step.key, supervision, self.config.negatives)  # (S, 1 + K), the target first
        return cross_entropy_of_first(self._scores(queries_SD, rows), rows, rows[:, :1])

    def _shared(self, queries_SD: Tensor, supervision: Supervision, step: StepContext) -> Tensor:
        targets_S1 = supervision.targets_S[:, None]
        rows_K = self.sampler.shared(step.key, self.config.negatives, queries_SD.device).long()
        scores = [self._scores(queries_SD, targets_S1), self._scores(queries_SD, rows_K)]
        return cross_entropy_of_first(torch.cat(scores, dim=1), F.pad(rows_K, (1, 0))[None], targets_S1)

    def _scores(self, queries_SD: Tensor, rows: Tensor) -> Tensor:
        scores = self.similarity.scores(queries_SD, rows)
        log_q = self.sampler.log_q(rows) if self.config.logq else None
        return scores if log_q is None else scores - log_q
