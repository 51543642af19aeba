"""What is asked of the operator, checked.

Shapes: T queries, K negatives, I table rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gr_kernels.candidate_scores import check_rows
from gr_kernels.log_partition.logits import Logits, check_logits


@dataclass(frozen=True, kw_only=True)
class Problem(Logits):
    """Queries, each with a target row and K negative rows of a table, its own (T, K) or everybody's (K,)."""

    targets: Tensor
    negatives: Tensor
    weights: Tensor | None
    counts: Tensor | None = None  # (K,)

    def negative_bias(self) -> Tensor | None:
        """What is added to the logits of shared negatives, (K,): their items' bias and the log of their counts."""
        bias_K = None if self.bias is None else self.bias[self.negatives]
        if self.counts is None:
            return bias_K
        log_counts_K = self.counts.detach().to(torch.promote_types(self.queries.dtype, torch.float32)).log()
        return log_counts_K if bias_K is None else bias_K + log_counts_K

    @property
    def shared(self) -> bool:
        return self.negatives.dim() == 1

    def total(self, losses_T: Tensor) -> Tensor:
        """The weighted sum."""
        return losses_T.sum() if self.weights is None else (losses_T * self.weights.detach()).sum()


def check(problem: Problem) -> None:
    """Raises ValueError, TypeError or IndexError, in one sentence, for arguments that don't fit."""
    check_logits(problem)
    targets, negatives = problem.targets, problem.negatives
    count, catalogue = problem.queries.shape[0], problem.table.shape[0]
    for name, rows in (("targets", targets), ("negatives", negatives)):
        if rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, not {rows.dtype}")
    if targets.shape != (count,):
        raise ValueError(f"targets must be ({count},), one for each query, not {tuple(targets.shape)}")
    if negatives.dim() not in (1, 2) or (negatives.dim() == 2 and negatives.shape[0] != count):
        raise ValueError(
            f"negatives must be (T, K) with T = {count} queries, or (K,) for all, not {tuple(negatives.shape)}"
        )
    if problem.weights is not None and problem.weights.shape != (count,):
        raise ValueError(f"weights must be ({count},), not {tuple(problem.weights.shape)}")
    counts = problem.counts
    if counts is not None and (not problem.shared or counts.shape != negatives.shape):
        raise ValueError(
            "counts must be (K,), one of each shared negative, not "
            f"{tuple(counts.shape)} for negatives of {tuple(negatives.shape)}"
        )
    check_rows(targets, catalogue, "target")
    check_rows(negatives, catalogue, "negative")
