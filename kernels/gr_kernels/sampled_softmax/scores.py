"""Any device and dtype: the candidates' scores (on CPU of the C++ operator), then the cross-entropy of the first.

Shapes: T queries, K negatives, C = 1 + K candidates, I table rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.log_partition.logits import full_precision, normalized
from gr_kernels.sampled_softmax.first_of_row import cross_entropy_of_first
from gr_kernels.sampled_softmax.problem import Problem
from gr_kernels.sampled_softmax.shared_chunks import shared_loss


def loss(problem: Problem) -> Tensor:
    """The sum of the losses: a scalar."""
    with full_precision(problem.queries):
        problem = problem.widened()
        return _shared(problem) if problem.shared else _own(problem)


def _own(problem: Problem) -> Tensor:
    targets_T1 = problem.targets.to(problem.negatives.dtype)[:, None]
    rows_TC = torch.cat([targets_T1, problem.negatives], dim=1)
    scaled_TD = problem.queries * problem.scale  # T x D numbers, rather than the T x K scores
    scores_TC = _full(
        candidate_scores(scaled_TD, problem.table, rows_TC, normalize_eps=problem.normalize_eps)
    )
    if problem.bias is not None:
        scores_TC = scores_TC + problem.bias[rows_TC]
    return cross_entropy_of_first(scores_TC, rows_TC, targets_T1, problem.weights)


def _shared(problem: Problem) -> Tensor:
    rows_KD, labels_TD = gathered(problem)
    bias_T = None if problem.bias is None else problem.bias[problem.targets]
    if len(problem.negatives) == 0:
        logits_T = (_full(problem.queries) * _full(labels_TD)).sum(1) * problem.scale
        return problem.total((logits_T if bias_T is None else logits_T + bias_T) * 0.0)
    return shared_loss(problem, rows_KD, labels_TD, bias_T)


def gathered(problem: Problem) -> tuple[Tensor, Tensor]:
    """The rows of shared negatives (K, D) and of targets (T, D), normalised on request.

    Taken together: the table has one dense gradient, not two to be added.
    """
    rows = torch.cat([problem.negatives.long(), problem.targets.long()])
    vectors = F.embedding(rows, problem.table)
    if problem.normalize_eps is not None:
        vectors = normalized(vectors, problem.normalize_eps)
    return vectors[: len(problem.negatives)], vectors[len(problem.negatives) :]


def _full(scores: Tensor) -> Tensor:
    """Scores in float32 at least."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
