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
from gr.models.objectives.negatives import NegativeSampler
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class SampledSoftmax(nn.Module):
    needs_global_targets = False

    class Config(ComponentConfig):
        """negatives: K, drawn with replacement, for each target or (``shared``) once a step for the global batch."""

        name: Literal["sampled_softmax"] = "sampled_softmax"
        negatives: POSITIVE = 128
        shared: bool = False
        sampling: Literal["uniform", "popularity"] = "uniform"
        logq: bool = False

    def __init__(self, config: Config, similarity: Similarity, items: int, item_counts: Tensor) -> None:
        super().__init__()
        self.config = config
        self.similarity = similarity
        self.sampler = NegativeSampler(config.sampling, items, item_counts)

    def forward(self, queries_SD: Tensor, supervision: Supervision, step: StepContext) -> Tensor:
        """The sum of the losses of the S targets: a float32 scalar."""
        if self.config.shared:
            logits, masked = self._shared(queries_SD, supervision, step)
        else:
            rows = self.sampler.own(step.key, supervision, self.config.negatives)
            logits = self._corrected(self.similarity.scores(queries_SD, rows), rows)
            masked = rows == rows[:, :1]
        masked[:, 0] = False  # column 0 is the target itself
        return F.cross_entropy(
            logits.masked_fill(masked, -torch.inf), torch.zeros_like(supervision.targets_S), reduction="sum"
        )

    def _shared(
        self, queries_SD: Tensor, supervision: Supervision, step: StepContext
    ) -> tuple[Tensor, Tensor]:
        """(S, 1 + K) scores, the target's first, and which of the rows are the target."""
        targets_S1 = supervision.targets_S[:, None]
        rows_K = self.sampler.shared(step.key, self.config.negatives, queries_SD.device)
        scores_S1 = self._corrected(self.similarity.scores(queries_SD, targets_S1), targets_S1)
        scores_SK = self._corrected(self.similarity.scores(queries_SD, rows_K), rows_K)
        return torch.cat([scores_S1, scores_SK], dim=1), F.pad(rows_K == targets_S1, (1, 0))

    def _corrected(self, scores: Tensor, rows: Tensor) -> Tensor:
        log_q = self.sampler.log_q(rows) if self.config.logq else None
        return scores if log_q is None else scores - log_q
