"""What is asked of the operator, checked.

Shapes: T queries, K negatives, I table rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gr_kernels.candidate_scores import check_inputs, check_rows


@dataclass(frozen=True)
class Problem:
    """Queries, each with a target row and K negative rows of a table, its own (T, K) or everybody's (K,)."""

    queries: Tensor
    table: Tensor
    targets: Tensor
    negatives: Tensor
    weights: Tensor | None
    scale: float
    normalize_eps: float | None
    bias: Tensor | None
    max_scores: int

    @property
    def shared(self) -> bool:
        return self.negatives.dim() == 1

    def heeding_no_grad(self) -> Problem:
        """Detached inputs where no gradient is recorded: a Function would still see that they require one."""
        if torch.is_grad_enabled():
            return self
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, queries=self.queries.detach(), table=self.table.detach(), bias=bias)

    def total(self, losses_T: Tensor) -> Tensor:
        """The weighted sum."""
        return losses_T.sum() if self.weights is None else (losses_T * self.weights.detach()).sum()


def check(problem: Problem) -> None:
    """Raises ValueError, TypeError or IndexError, in one sentence, for arguments that don't fit."""
    queries, table, targets, negatives = problem.queries, problem.table, problem.targets, problem.negatives
    check_inputs(queries, table, problem.normalize_eps)
    count, catalogue = queries.shape[0], table.shape[0]
    for name, rows in (("targets", targets), ("negatives", negatives)):
        if rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, not {rows.dtype}")
    if targets.shape != (count,):
        raise ValueError(f"targets must be ({count},), one for each query, not {tuple(targets.shape)}")
    if negatives.dim() not in (1, 2) or (negatives.dim() == 2 and negatives.shape[0] != count):
        raise ValueError(
            f"negatives must be (T, K) with T = {count} queries, or (K,) for all, not {tuple(negatives.shape)}"
        )
    if problem.bias is not None and problem.bias.shape != (catalogue,):
        raise ValueError(
            f"bias must be ({catalogue},), one value a table row, not {tuple(problem.bias.shape)}"
        )
    if problem.weights is not None and problem.weights.shape != (count,):
        raise ValueError(f"weights must be ({count},), not {tuple(problem.weights.shape)}")
    if problem.max_scores < 1:
        raise ValueError(f"max_scores must be at least 1, got {problem.max_scores}")
    check_rows(targets, catalogue, "target")
    check_rows(negatives, catalogue, "negative")
