"""Candidates gathered a chunk of queries at a time; gradients recomputed chunk by chunk.

Shapes: T queries, K candidates of a query, I catalogue size, D width, C queries of a chunk.
At most MAX_VALUES gathered numbers exist at once. Any device and float dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels import rows

MAX_VALUES = 1 << 22


class _GatheredScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None
    ) -> Tensor:
        ctx.save_for_backward(queries_TD, table_ID, rows_TK)
        ctx.normalize_eps = normalize_eps
        scores_TK = queries_TD.new_empty(rows_TK.shape)
        for chunk in _chunks(rows_TK, table_ID.shape[1]):
            rows_CKD = table_ID[rows_TK[chunk]]
            scores_CK = torch.bmm(rows_CKD, queries_TD[chunk].unsqueeze(2)).squeeze(2)
            if normalize_eps is not None:
                scores_CK = scores_CK / rows_CKD.norm(dim=-1).clamp_min(normalize_eps)
            scores_TK[chunk] = scores_CK
        return scores_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        queries_TD, table_ID, rows_TK = ctx.saved_tensors
        (grad_TK,) = grads
        eps = ctx.normalize_eps
        want_queries, want_table = ctx.needs_input_grad[:2]
        grad_queries_TD = torch.empty_like(queries_TD) if want_queries else None
        grad_table_ID = torch.zeros_like(table_ID) if want_table else None
        for chunk in _chunks(rows_TK, table_ID.shape[1]):
            rows_CKD = table_ID[rows_TK[chunk]]
            grad_CK, queries_CD = grad_TK[chunk], queries_TD[chunk]
            if eps is not None:
                norm_CK = rows_CKD.norm(dim=-1)
                grad_CK = grad_CK / norm_CK.clamp_min(eps)
            if grad_queries_TD is not None:
                grad_queries_TD[chunk] = torch.bmm(grad_CK.unsqueeze(1), rows_CKD).squeeze(1)
            if grad_table_ID is None:
                continue
            grad_CKD = grad_CK.unsqueeze(2) * queries_CD.unsqueeze(1)
            if eps is not None:
                # d(q.e/|e|)/de = q/|e| - (q.e/|e|) e/|e|^2; where the divisor is the constant eps, the first part
                along_CK = grad_CK * torch.bmm(rows_CKD, queries_CD.unsqueeze(2)).squeeze(2)
                along_CK = torch.where(norm_CK < eps, torch.zeros_like(along_CK), along_CK / norm_CK.square())
                grad_CKD.sub_(rows_CKD.mul_(along_CK.unsqueeze(2)))
            grad_table_ID.index_add_(0, rows_TK[chunk].flatten(), grad_CKD.flatten(0, 1))
        return grad_queries_TD, grad_table_ID, None, None


def _chunks(rows_TK: Tensor, width: int) -> list[slice]:
    count, candidates = rows_TK.shape
    return rows.chunks(count, candidates * width, MAX_VALUES)


def candidate_scores(
    queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None = None
) -> Tensor:
    """(T, K) scores as ``reference.candidate_scores``, never T x K x D at once."""
    return _GatheredScores.apply(queries_TD, table_ID, rows_TK.long(), normalize_eps)
