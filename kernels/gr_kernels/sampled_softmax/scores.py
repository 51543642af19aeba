"""Any device and dtype: the candidates' scores (on CPU of the C++ operator), then the cross-entropy of the first.

Shapes: T queries, K negatives, I table rows, D width, C queries of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.sampled_softmax.first_of_row import cross_entropy_of_first
from gr_kernels.sampled_softmax.problem import Problem


def loss(problem: Problem) -> Tensor:
    """The sum of the losses: a scalar."""
    with torch.autocast(problem.queries.device.type, enabled=False):
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
    """A chunk of queries at a time, its scores formed again in the backward pass, where they are too many."""
    rows_KD, labels_TD = gathered(problem)
    count, negatives = len(problem.targets), len(problem.negatives)
    step = max(1, problem.max_scores // max(1, negatives))
    if count <= step:
        return _shared_chunk(problem, slice(None), problem.queries, rows_KD, labels_TD)
    total = problem.queries.new_zeros((), dtype=torch.promote_types(problem.queries.dtype, torch.float32))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        total = total + checkpoint(
            _shared_chunk,
            problem,
            chunk,
            problem.queries[chunk],
            rows_KD,
            labels_TD[chunk],
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def _shared_chunk(
    problem: Problem, chunk: slice, queries_CD: Tensor, rows_KD: Tensor, labels_CD: Tensor
) -> Tensor:
    scaled_CD = queries_CD * problem.scale
    label_C1 = (_full(scaled_CD) * _full(labels_CD)).sum(1, keepdim=True)
    scores_CK = _full(scaled_CD @ rows_KD.t())
    targets_C, negatives_K = problem.targets[chunk].long(), problem.negatives.long()
    if problem.bias is not None:
        label_C1 = label_C1 + problem.bias[targets_C, None]
        scores_CK = scores_CK + problem.bias[negatives_K]
    weights_C = None if problem.weights is None else problem.weights[chunk]
    return cross_entropy_of_first(
        torch.cat([label_C1, scores_CK], dim=1),
        F.pad(negatives_K, (1, 0))[None],
        targets_C[:, None],
        weights_C,
    )


def gathered(problem: Problem) -> tuple[Tensor, Tensor]:
    """The rows of shared negatives (K, D) and of targets (T, D), normalised on request.

    Taken together: the table has one dense gradient, not two to be added.
    """
    rows = torch.cat([problem.negatives.long(), problem.targets.long()])
    vectors = F.embedding(rows, problem.table)
    if problem.normalize_eps is not None:
        vectors = F.normalize(vectors, dim=-1, eps=problem.normalize_eps)
    return vectors[: len(problem.negatives)], vectors[len(problem.negatives) :]


def _full(scores: Tensor) -> Tensor:
    """Scores in float32 at least."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
