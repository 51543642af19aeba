"""The definitions, in plain PyTorch, differentiated by autograd: all T x I logits at once.

Shapes: T queries, I catalogue size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.log_partition.problem import Problem
from gr_kernels.logits import full, full_precision, total


def log_partition(problem: Problem) -> Tensor:
    """(T,) log of the sum of exp(logits) over the items seen; -inf, which moves nothing, where all of them are -inf."""
    with full_precision(problem.queries):
        logits_TI = _logits(problem)
        empty_T = (logits_TI == -torch.inf).all(dim=1)  # an empty sum's gradient would be 0 / 0
        sums_T = torch.logsumexp(logits_TI.masked_fill(empty_T[:, None], 0.0), dim=1)
        return sums_T.masked_fill(empty_T, -torch.inf)


def cross_entropy(problem: Problem) -> Tensor:
    """Scalar: the weighted sum of negative log-likelihoods of the targets."""
    assert problem.targets is not None
    with full_precision(problem.queries):
        losses_T = F.cross_entropy(_logits(problem), problem.targets.long(), reduction="none")
        return total(losses_T, problem.weights)


def _logits(problem: Problem) -> Tensor:
    """(T, I) ``scale * q . e + bias``, e divided by max(|e|, eps) on request; -inf for what a query doesn't see."""
    table_ID = problem.table
    if problem.normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=problem.normalize_eps)
    logits_TI = problem.scale * (problem.queries @ table_ID.t())
    if problem.bias is not None:
        logits_TI = logits_TI + problem.bias
    logits_TI = full(logits_TI)
    return logits_TI if problem.excluded is None else problem.exclude(logits_TI.clone())
