"""Losses of the target against single negatives.

    BCE: -log sigmoid(s_y) - sum_k log sigmoid(-s_k)        (SASRec, arXiv 1808.09781, with one negative)
    BPR: -sum_k log sigmoid(s_y - s_k)                      (Rendle et al., UAI 2009, arXiv 1205.2618)

A negative equal to the target counts nothing; with ``outside: sequence`` (IDvs.MoRec, SIGIR 2023) one that stands
anywhere in the target's sequence is drawn again.

Shapes: S targets, K negatives, D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.config import POSITIVE, ComponentConfig
from gr.embeddings.table import Table
from gr.models.model import Catalogue
from gr.models.objectives.histories import Histories
from gr.models.objectives.negatives import NegativeSampler
from gr.models.objectives.objective import Objective
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision

DRAWS = 8
"""Of a negative that has to be outside a sequence: all are inside with probability (n / I)^8."""


class _Pairwise(Objective):
    class Config(ComponentConfig):
        """negatives: K of each target, drawn with replacement.  outside: what they are not, the target alone or
        anything in its sequence, inputs and targets: of so many draws the first that is outside counts, and where all
        are inside nothing does."""

        negatives: POSITIVE = 1
        outside: Literal["target", "sequence"] = "target"
        sampling: Literal["uniform", "popularity"] = "uniform"

    def __init__(self, config: Config, similarity: Similarity, catalogue: Catalogue) -> None:
        super().__init__(similarity)
        self.config = config
        self.sampler = NegativeSampler(config.sampling, catalogue)

    def summed(
        self,
        similarity: Similarity,
        queries_SD: Tensor,
        part: Supervision,
        step: StepContext,
        items: Table,
    ) -> Tensor:
        rows = step.taken(part, lambda: self._rows(part, step))
        scores = similarity.candidates(step.views["items"], queries_SD, rows)
        counts = rows[:, 1:] != rows[:, :1]
        if self.config.outside == "sequence":
            counts &= ~Histories(part, self.sampler.items).have(rows[:, 1:])
        return self.loss(scores[:, :1], scores[:, 1:], counts)

    def wanted(self, part: Supervision, step: StepContext) -> list[Tensor]:
        return [step.announced(part, lambda: self._rows(part, step))]

    def _rows(self, part: Supervision, step: StepContext) -> Tensor:
        """(S, 1 + K), the target first."""
        negatives = self.config.negatives
        if self.config.outside == "target":
            return self.sampler.own(step.key, part, negatives)
        draws = self.sampler.own(step.key, part, negatives * DRAWS)
        inside_SKN = Histories(part, self.sampler.items).have(draws[:, 1:]).view(-1, negatives, DRAWS)
        first_SK1 = inside_SKN.int().argmin(2, keepdim=True)
        chosen_SK = draws[:, 1:].view(-1, negatives, DRAWS).gather(2, first_SK1)[:, :, 0]
        return torch.cat([draws[:, :1], chosen_SK], dim=1)

    def loss(self, positives_S1: Tensor, negatives_SK: Tensor, counts_SK: Tensor) -> Tensor:
        """``counts_SK``: whether a negative counts (it is another item than the target)."""
        raise NotImplementedError


class BCE(_Pairwise):
    """Binary cross-entropy of the target (1) and its negatives (0)."""

    class Config(_Pairwise.Config):
        name: Literal["bce"] = "bce"

    def loss(self, positives_S1: Tensor, negatives_SK: Tensor, counts_SK: Tensor) -> Tensor:
        return F.softplus(-positives_S1).sum() + (F.softplus(negatives_SK) * counts_SK).sum()


class BPR(_Pairwise):
    """Bayesian personalised ranking: the target above each negative."""

    class Config(_Pairwise.Config):
        name: Literal["bpr"] = "bpr"

    def loss(self, positives_S1: Tensor, negatives_SK: Tensor, counts_SK: Tensor) -> Tensor:
        return (F.softplus(negatives_SK - positives_S1) * counts_SK).sum()
