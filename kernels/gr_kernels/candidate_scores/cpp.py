"""The C++ operator for float32 on CPU: kernels/csrc/candidate_scores.cpp.

Shapes: T queries, K candidates of a query, I catalogue size, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr_kernels import native

_NORMALIZE_ONCE = 4  # times a row is met on average, from which the table is normalised beforehand


class _NativeScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None
    ) -> Tensor:
        # inverse_I is empty without normalisation; else 1 / max(|e|, eps), negative where eps was the larger,
        # and set for the rows of rows_TK only
        scores_TK, inverse_I = torch.ops.gr_kernels.candidate_scores(
            queries_TD, table_ID, rows_TK, normalize_eps
        )
        ctx.save_for_backward(queries_TD, table_ID, rows_TK, inverse_I)
        return scores_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        queries_TD, table_ID, rows_TK, inverse_I = ctx.saved_tensors
        want_queries, want_table = ctx.needs_input_grad[:2]
        grad_queries_TD, grad_table_ID = torch.ops.gr_kernels.candidate_scores_backward(
            grads[0].contiguous(), queries_TD, table_ID, rows_TK, inverse_I, want_queries, want_table
        )
        return grad_queries_TD if want_queries else None, grad_table_ID if want_table else None, None, None


def obstacle(queries_TD: Tensor, *call: Any) -> str:
    """The reason, in a few words, why the operator can't take this call; "" when it can."""
    if queries_TD.device.type != "cpu" or queries_TD.dtype != torch.float32:
        return f"the C++ operator takes float32 on cpu, not {queries_TD.dtype} on {queries_TD.device.type}"
    return native.why_unavailable()


def candidate_scores(
    queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None = None
) -> Tensor:
    """(T, K) scores as ``reference.candidate_scores``; int32 rows are read as they are."""
    if normalize_eps is not None and rows_TK.numel() >= _NORMALIZE_ONCE * table_ID.shape[0]:
        # each row is met several times: a normalised copy of the table costs less than norms on the way
        table_ID, normalize_eps = F.normalize(table_ID, dim=-1, eps=normalize_eps), None
    return _NativeScores.apply(
        queries_TD.contiguous(), table_ID.contiguous(), rows_TK.contiguous(), normalize_eps
    )
