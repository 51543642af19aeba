"""Sampled softmax: the cross-entropy of the target among itself and K sampled negatives.

    loss = log(exp s_y + sum_k [r_k != y] exp s_k) - s_y

A negative equal to the target is masked.  With ``logq`` every score, the target's too, is first lowered by the
log of the probability of drawing its item, which makes the sampled softmax an estimate of the full one (Bengio and
Senecal 2008; Jean et al., arXiv 1412.2007).

Shapes: S targets, K negatives, D model width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gr.config import POSITIVE, ComponentConfig
from gr.embeddings.table import Table
from gr.models.model import Catalogue
from gr.models.objectives.negatives import NegativeSampler
from gr.models.objectives.objective import Objective
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision


class SampledSoftmax(Objective):
    class Config(ComponentConfig):
        """negatives: K, drawn with replacement, for each target or (``shared``) once a step for the global batch.
        logq: subtract from each item's logit the logarithm of its chance to be drawn (with uniform sampling one
        constant for all, which cancels)."""

        name: Literal["sampled_softmax"] = "sampled_softmax"
        negatives: POSITIVE = 128
        shared: bool = False
        sampling: Literal["uniform", "popularity"] = "uniform"
        logq: bool = False

        def idle(self) -> dict[str, str]:
            return {"logq": "sampling is uniform"} if self.sampling == "uniform" else {}

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
        log_q_I = self.sampler.log_q_I if self.config.logq else None
        return similarity.sampled_softmax(
            step.views["items"],
            queries_SD,
            part.targets_S,
            step.taken(part, lambda: self._negatives(part, step)),
            None if log_q_I is None else -log_q_I,
        )

    def wanted(self, part: Supervision, step: StepContext) -> list[Tensor]:
        return [part.targets_S, step.announced(part, lambda: self._negatives(part, step))]

    def _negatives(self, part: Supervision, step: StepContext) -> Tensor:
        """Item rows, (K,) or (S, K)."""
        if self.config.shared:
            return self.sampler.shared(step.key, self.config.negatives, part.targets_S.device)
        rows_SC = self.sampler.own(step.key, part, self.config.negatives)
        return rows_SC[:, 1:]  # behind the target
