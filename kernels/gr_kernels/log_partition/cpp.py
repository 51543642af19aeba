"""float32 on CPU: the C++ operator (csrc/cross_entropy.cpp), which forms values and gradients in one pass.

Shapes: T queries, I catalogue size, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels import native
from gr_kernels.log_partition.problem import Problem
from gr_kernels.logits import total

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def obstacle(problem: Problem) -> str:
    """The reason, in a few words, why the operator can't take this call; "" when it can."""
    queries, bias = problem.queries, problem.bias
    if queries.device.type != "cpu" or queries.dtype != torch.float32:
        return f"the C++ operator takes float32 on cpu, not {queries.dtype} on {queries.device.type}"
    if bias is not None and bias.dtype != torch.float32:
        return f"the C++ operator takes a float32 bias, not {bias.dtype}"
    if problem.excluded is not None:
        return "the C++ operator takes no excluded items"
    return native.why_unavailable()


def log_partition(problem: Problem) -> Tensor:
    problem = problem.with_normalized_table()
    return _LogPartition.apply(problem.queries, problem.table, problem.bias, problem.scale)


def cross_entropy(problem: Problem) -> Tensor:
    problem = problem.with_normalized_table()
    assert problem.targets is not None
    return _CrossEntropy.apply(
        problem.queries, problem.table, problem.bias, problem.targets.long(), problem.weights, problem.scale
    )


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None, scale: float
    ) -> Tensor:
        want_queries, want_table, want_bias = ctx.needs_input_grad[:3]
        # A row's own gradient waits for its upstream weight alone; the table's mixes all rows and is formed backward.
        ctx.queries_alone = want_queries and not (want_table or want_bias)
        ctx.scale = scale
        wanted = (ctx.queries_alone, False, False)
        values_T, (grad_TD, _, _) = _full_softmax(queries_TD, table_ID, bias_I, None, None, scale, wanted)
        ctx.save_for_backward(*((grad_TD,) if ctx.queries_alone else (queries_TD, table_ID, bias_I)))
        return values_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_T,) = grads
        if ctx.queries_alone:
            return ctx.saved_tensors[0] * grad_T[:, None], None, None, None
        queries_TD, table_ID, bias_I = ctx.saved_tensors
        _, gradients = _full_softmax(
            queries_TD, table_ID, bias_I, None, grad_T, ctx.scale, ctx.needs_input_grad[:3]
        )
        return *gradients, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_TD: Tensor,
        table_ID: Tensor,
        bias_I: Tensor | None,
        targets_T: Tensor,
        weights_T: Tensor | None,
        scale: float,
    ) -> Tensor:
        weights = None if weights_T is None else weights_T.float()
        losses_T, gradients = _full_softmax(
            queries_TD, table_ID, bias_I, targets_T, weights, scale, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(*gradients)
        return total(losses_T, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None, None


def _full_softmax(
    queries_TD: Tensor,
    table_ID: Tensor,
    bias_I: Tensor | None,
    targets_T: Tensor | None,
    weights_T: Tensor | None,
    scale: float,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Gradients]:
    """Per query log-sum-exp (less the target's logit), and the wanted gradients of its weighted sum."""
    dense = [
        None if x is None else x.contiguous() for x in (queries_TD, table_ID, bias_I, targets_T, weights_T)
    ]
    values_T, *gradients = torch.ops.gr_kernels.full_softmax(*dense, scale, *wanted)
    queries, table, bias = (g if want else None for g, want in zip(gradients, wanted))
    return values_T, (queries, table, bias)
