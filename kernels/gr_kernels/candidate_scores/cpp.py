"""The C++ operator for float32 on CPU: kernels/csrc/candidate_scores.cpp.

Shapes: T queries, K candidates of a query, I catalogue size, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels import native
from gr_kernels.operators import refuse_twice
from gr_kernels.tracing import once

_NORMALIZE_ONCE = 4  # times a row is met on average, from which the table is normalised beforehand


def obstacle(queries_TD: Tensor, *call: Any) -> str:
    """The reason, in a few words, why the operator can't take this call; "" when it can."""
    if queries_TD.device.type != "cpu" or queries_TD.dtype != torch.float32:
        return f"the C++ operator takes float32 on cpu, not {queries_TD.dtype} on {queries_TD.device.type}"
    return native.why_unavailable()


def candidate_scores(
    queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None = None
) -> Tensor:
    """(T, K) scores as ``reference.candidate_scores``; after `register`; int32 rows are read as they are."""
    if normalize_eps is not None and rows_TK.numel() >= _NORMALIZE_ONCE * table_ID.shape[0]:
        # each row is met several times: a normalised copy of the table costs less than norms on the way
        table_ID, normalize_eps = F.normalize(table_ID, dim=-1, eps=normalize_eps), None
    scores_TK, _ = torch.ops.gr_kernels.candidate_scores(
        queries_TD.contiguous(), table_ID.contiguous(), rows_TK.contiguous(), normalize_eps
    )
    return scores_TK  # type: ignore[no-any-return]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries_TD, table_ID, rows_TK, _ = inputs
    # inverse_I is empty without normalisation; else 1 / max(|e|, eps), negative where eps was the larger, and set for
    # the rows of rows_TK only
    _, inverse_I = output
    ctx.mark_non_differentiable(inverse_I)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(queries_TD, table_ID, rows_TK, inverse_I)


def _backward(
    ctx: Any, grad_TK: Tensor | None, *others: None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    if grad_TK is None:
        return None, None, None, None
    want_queries, want_table = ctx.needs_input_grad[:2]
    grad_queries_TD, grad_table_ID = torch.ops.gr_kernels.candidate_scores_backward(
        grad_TK.contiguous(), *ctx.saved_tensors, want_queries, want_table
    )
    return grad_queries_TD if want_queries else None, grad_table_ID if want_table else None, None, None


@once
def register() -> None:
    """Gradients of the compiled operators. (Shapes for tracing come from their Meta implementations.)"""
    torch.library.register_autograd("gr_kernels::candidate_scores", _backward, setup_context=_keep)
    refuse_twice("candidate_scores_backward")
