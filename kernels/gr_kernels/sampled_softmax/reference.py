"""The definition, in plain torch, differentiated by autograd: stores every gathered row.

Shapes: T queries, K negatives of a query, I table rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.log_partition.logits import full_precision
from gr_kernels.sampled_softmax.problem import Problem


def losses(
    queries_TD: Tensor,
    table_ID: Tensor,
    targets_T: Tensor,
    negatives: Tensor,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    counts_K: Tensor | None = None,
) -> Tensor:
    """(T,) log(exp z_y + sum_{k: r_k != y} n_k exp z_k) - z_y, z = scale * q . e + bias."""
    rows_TK = negatives.long().expand(len(targets_T), -1) if negatives.dim() == 1 else negatives.long()
    rows_TC = torch.cat([targets_T.long()[:, None], rows_TK], dim=1)
    candidates_TCD = F.embedding(rows_TC, table_ID)
    if normalize_eps is not None:
        candidates_TCD = F.normalize(candidates_TCD, dim=-1, eps=normalize_eps)
    logits_TC = scale * torch.einsum("td,tcd->tc", queries_TD, candidates_TCD)
    if bias_I is not None:
        logits_TC = logits_TC + bias_I[rows_TC]
    if counts_K is not None:
        logits_TC = logits_TC + F.pad(counts_K.to(logits_TC.dtype).log(), (1, 0))
    collides_TC = rows_TC == targets_T[:, None]
    collides_TC[:, 0] = False
    logits_TC = logits_TC.masked_fill(collides_TC, -torch.inf)
    return torch.logsumexp(logits_TC, dim=1) - logits_TC[:, 0]


def loss(problem: Problem) -> Tensor:
    with full_precision(problem.queries):
        losses_T = losses(
            problem.queries,
            problem.table,
            problem.targets,
            problem.negatives,
            problem.scale,
            problem.normalize_eps,
            problem.bias,
            problem.counts,
        )
    return problem.total(losses_T.to(torch.promote_types(problem.queries.dtype, torch.float32)))
