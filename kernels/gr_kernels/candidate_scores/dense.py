"""Scores of the whole catalogue by GEMM, then the candidates picked out of them.

Shapes: T queries, K candidates of a query, I catalogue size, D width, C queries of a chunk.
Three GEMMs of T x I x D whatever K is: right when K is a fair share of I.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr_kernels.rows import chunks

MAX_SCORES = 1 << 22  # scores of the catalogue that exist at once


class _DenseScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(queries_TD, table_ID, rows_TK)
        scores_TK = queries_TD.new_empty(rows_TK.shape)
        for chunk in chunks(rows_TK.shape[0], table_ID.shape[0], MAX_SCORES):
            scores_CI = queries_TD[chunk] @ table_ID.t()
            torch.gather(scores_CI, 1, rows_TK[chunk], out=scores_TK[chunk])
        return scores_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        queries_TD, table_ID, rows_TK = ctx.saved_tensors
        (grad_TK,) = grads
        want_queries, want_table = ctx.needs_input_grad[:2]
        grad_queries_TD = torch.empty_like(queries_TD) if want_queries else None
        grad_table_ID = torch.zeros_like(table_ID) if want_table else None
        for chunk in chunks(rows_TK.shape[0], table_ID.shape[0], MAX_SCORES):
            grad_CI = grad_TK.new_zeros(rows_TK[chunk].shape[0], table_ID.shape[0])
            grad_CI.scatter_add_(1, rows_TK[chunk], grad_TK[chunk])  # a row drawn twice counts twice
            if grad_queries_TD is not None:
                torch.mm(grad_CI, table_ID, out=grad_queries_TD[chunk])
            if grad_table_ID is not None:
                grad_table_ID.addmm_(grad_CI.t(), queries_TD[chunk])
        return grad_queries_TD, grad_table_ID, None


def candidate_scores(
    queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None = None
) -> Tensor:
    """(T, K) scores as ``reference.candidate_scores``; a NaN anywhere in the table reaches every gradient."""
    if normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=normalize_eps)
    return _DenseScores.apply(queries_TD.contiguous(), table_ID.contiguous(), rows_TK.long().contiguous())
