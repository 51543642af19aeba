"""The definition, in plain PyTorch, differentiated by autograd: stores every gathered row.

Shapes: T queries, K negatives of a query, I table rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.logits import full, full_precision, total
from gr_kernels.sampled_softmax.problem import Problem


def sampled_softmax(problem: Problem) -> Tensor:
    """The weighted sum of log(exp z_y + sum_{k: r_k != y} n_k exp z_k) - z_y, z = scale * q . e + bias."""
    targets_T1, negatives = problem.targets.long()[:, None], problem.negatives.long()
    with full_precision(problem.queries):
        rows_TK = negatives.expand(len(targets_T1), -1) if problem.shared else negatives
        rows_TC = torch.cat([targets_T1, rows_TK], dim=1)
        candidates_TCD = F.embedding(rows_TC, problem.table)
        if problem.normalize_eps is not None:
            candidates_TCD = F.normalize(candidates_TCD, dim=-1, eps=problem.normalize_eps)
        logits_TC = problem.scale * torch.einsum("td,tcd->tc", problem.queries, candidates_TCD)
        if problem.bias is not None:
            logits_TC = logits_TC + problem.bias[rows_TC]
        if problem.counts is not None:
            logits_TC = logits_TC + F.pad(problem.counts.to(logits_TC.dtype).log(), (1, 0))
        collides_TC = rows_TC == targets_T1
        collides_TC[:, 0] = False
        logits_TC = logits_TC.masked_fill(collides_TC, -torch.inf)
        return total(full(torch.logsumexp(logits_TC, dim=1) - logits_TC[:, 0]), problem.weights)
