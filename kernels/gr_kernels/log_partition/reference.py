"""The definitions, in plain torch, differentiated by autograd: all T x I logits at once.

Shapes: T queries, I catalogue size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.log_partition.logits import full_precision
from gr_kernels.log_partition.problem import Problem


def logits(
    queries_TD: Tensor, table_ID: Tensor, scale: float, normalize_eps: float | None, bias_I: Tensor | None
) -> Tensor:
    """(T, I) ``scale * q . e + bias``, e divided by max(|e|, eps) on request."""
    if normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=normalize_eps)
    logits_TI = scale * (queries_TD @ table_ID.t())
    return logits_TI if bias_I is None else logits_TI + bias_I


def log_partition(
    queries_TD: Tensor,
    table_ID: Tensor,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
) -> Tensor:
    """(T,) log of the sum of exp(logits) over the catalogue; -inf, which moves nothing, where all of them are -inf."""
    return _log_sum_exp(logits(queries_TD, table_ID, scale, normalize_eps, bias_I))


def _log_sum_exp(logits_TI: Tensor) -> Tensor:
    """(T,); an empty sum's gradient would be 0 / 0."""
    empty_T = (logits_TI == -torch.inf).all(dim=1)
    sums_T = torch.logsumexp(logits_TI.masked_fill(empty_T[:, None], 0.0), dim=1)
    return sums_T.masked_fill(empty_T, -torch.inf)


def cross_entropy(
    queries_TD: Tensor,
    table_ID: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
) -> Tensor:
    """Scalar: the weighted sum of negative log-likelihoods of the targets."""
    losses_T = F.cross_entropy(
        logits(queries_TD, table_ID, scale, normalize_eps, bias_I), targets_T.long(), reduction="none"
    )
    return (losses_T if weights_T is None else losses_T * weights_T).sum()


def log_partition_of(problem: Problem) -> Tensor:
    """``log_partition`` without what each query excludes."""
    with full_precision(problem.queries):
        return _log_sum_exp(_seen_logits(problem))


def cross_entropy_of(problem: Problem) -> Tensor:
    """``cross_entropy`` without what each query excludes, its target apart."""
    assert problem.targets is not None
    with full_precision(problem.queries):
        losses_T = F.cross_entropy(
            _seen_logits(problem.keeping_targets()), problem.targets.long(), reduction="none"
        )
    return (losses_T if problem.weights is None else losses_T * problem.weights).sum()


def _seen_logits(problem: Problem) -> Tensor:
    logits_TI = logits(problem.queries, problem.table, problem.scale, problem.normalize_eps, problem.bias)
    if logits_TI.dtype in (torch.float16, torch.bfloat16):
        logits_TI = logits_TI.float()
    return logits_TI if problem.excluded is None else problem.exclude(logits_TI.clone())
