"""Losses of the target against single negatives.

    BCE: -log sigmoid(s_y) - sum_k log sigmoid(-s_k)        (SASRec, arXiv 1808.09781, with one negative)
    BPR: -sum_k log sigmoid(s_y - s_k)                      (Rendle et al., UAI 2009, arXiv 1205.2618)

A negative equal to the target counts nothing.

Shapes: S targets, K negatives, D model width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from gr.config import POSITIVE, ComponentConfig
from gr.embeddings.table import Table
from gr.models.model import Catalogue
from gr.models.objectives.negatives import NegativeSampler
from gr.models.objectives.objective import Objective
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class _Pairwise(Objective):
    class Config(ComponentConfig):
        """negatives: K of each target, drawn with replacement."""

        negatives: POSITIVE = 1
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
        return self.loss(scores[:, :1], scores[:, 1:], rows[:, 1:] != rows[:, :1])

    def wanted(self, part: Supervision, step: StepContext) -> list[Tensor]:
        return [step.announced(part, lambda: self._rows(part, step))]

    def _rows(self, part: Supervision, step: StepContext) -> Tensor:
        """(S, 1 + K), the target first."""
        return self.sampler.own(step.key, part, self.config.negatives)

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
