"""What is asked of the operator, checked.

Shapes: T queries, K negatives, I table rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.logits import Logits, check_logits, check_targets, normalized
from gr_kernels.rows import check_kind, check_range


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
        log_counts_K = self.counts.to(torch.promote_types(self.queries.dtype, torch.float32)).log()
        return log_counts_K if bias_K is None else bias_K + log_counts_K

    @property
    def shared(self) -> bool:
        return self.negatives.dim() == 1

    def gathered(self) -> tuple[Tensor, Tensor]:
        """The rows of shared negatives (K, D) and of targets (T, D), normalised on request.

        Taken together: the table has one dense gradient, not two to be added.
        """
        rows = torch.cat([self.negatives.long(), self.targets.long()])
        vectors = F.embedding(rows, self.table)
        if self.normalize_eps is not None:
            vectors = normalized(vectors, self.normalize_eps)
        return vectors[: len(self.negatives)], vectors[len(self.negatives) :]


def check(problem: Problem) -> None:
    """Raises ValueError, TypeError or IndexError, in one sentence, for arguments that don't fit."""
    check_logits(problem)
    negatives, counts = problem.negatives, problem.counts
    count, catalogue = problem.queries.shape[0], problem.table.shape[0]
    check_targets(problem.targets, problem.weights, count, catalogue)
    check_kind(negatives, "negatives")
    if negatives.dim() not in (1, 2) or (negatives.dim() == 2 and negatives.shape[0] != count):
        raise ValueError(
            f"negatives must be (T, K) with T = {count} queries, or (K,) for all, not {tuple(negatives.shape)}"
        )
    if counts is not None and (not problem.shared or counts.shape != negatives.shape):
        raise ValueError(
            "counts must be (K,), one of each shared negative, not "
            f"{tuple(counts.shape)} for negatives of {tuple(negatives.shape)}"
        )
    check_range(negatives, catalogue, "negative")
