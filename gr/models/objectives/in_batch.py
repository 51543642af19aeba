"""In-batch softmax, corrected for popularity: the targets of the whole global batch are everyone's candidates.

    loss = log(exp c_y + sum_{g: r_g != y} exp c_g) - c_y,    c_i = s_i - log p_i

p_i, the share of item i in the training targets, is the probability that it turns up as a candidate (Yi et al.,
RecSys 2019, "Sampling-bias-corrected neural modeling", eq. 3: the correction lowers the target's score too).
Candidates equal to the target are masked, so that it counts once.

Shapes: S targets, G targets of the global batch, I catalogue size, C queries of a chunk.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gr.config import ComponentConfig
from gr.models.borrow import borrow
from gr.models.objectives.negatives import popularity
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision

MAX_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}  # scores of a chunk: on a CPU few enough to stay in its caches


class InBatchDebiased(nn.Module):
    similarity: Similarity
    needs_global_targets = True
    log_p_I: Tensor

    class Config(ComponentConfig):
        """logq: correct for popularity; without it the plain in-batch softmax."""

        name: Literal["in_batch"] = "in_batch"
        logq: bool = True

    def __init__(self, config: Config, similarity: Similarity, items: int, item_counts: Tensor) -> None:
        super().__init__()
        borrow(self, "similarity", similarity)
        self.items = items
        log_p_I = popularity(item_counts)[1].log() if config.logq else torch.zeros(items)
        self.register_buffer("log_p_I", log_p_I, persistent=False)

    def forward(self, queries_SD: Tensor, supervision: Supervision, step: StepContext) -> Tensor:
        """The sum of the losses of the S targets: a float32 scalar."""
        if step.candidates_G is None:
            raise ValueError("in_batch needs StepContext.candidates_G: the targets of the global batch")
        if len(step.candidates_G) <= self.items:
            return self.similarity.sampled_softmax(
                queries_SD, supervision.targets_S, step.candidates_G, -self.log_p_I
            )
        return self._each_item_once(queries_SD, supervision.targets_S, step.candidates_G)

    def _each_item_once(self, queries_SD: Tensor, targets_S: Tensor, candidates_G: Tensor) -> Tensor:
        """The same sum in fewer scores: each item stands once, with the log of its occurrences added."""
        counts_I = torch.zeros(self.items, dtype=torch.int64, device=candidates_G.device)
        counts_I.index_add_(0, candidates_G, torch.ones_like(candidates_G))
        bias_I = counts_I.log() - self.log_p_I
        chunk = max(1, MAX_SCORES.get(queries_SD.device.type, 1 << 24) // self.items)
        total = queries_SD.new_zeros((), dtype=torch.float32)
        # one chunk at least, so that an empty batch has its zero gradients; scores are formed again in backward
        for start in range(0, max(1, len(targets_S)), chunk):
            part = slice(start, start + chunk)
            total = total + checkpoint(
                self._loss, queries_SD[part], targets_S[part], bias_I, use_reentrant=False
            )
        return total

    def _loss(self, queries_CD: Tensor, targets_C: Tensor, bias_I: Tensor) -> Tensor:
        targets_C1 = targets_C[:, None]
        scores_CI = self.similarity.scores(queries_CD, range(self.items))
        target_C1 = scores_CI.gather(1, targets_C1) - self.log_p_I[targets_C1]  # counted once
        logits = (scores_CI + bias_I).scatter(1, targets_C1, target_C1)
        return F.cross_entropy(logits, targets_C, reduction="sum")
