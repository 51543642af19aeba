"""Autograd of the Triton losses over a table's rows, and what their operators have in common.

An operator of the name NAME takes (queries, table, bias, further tensors ..., scale, normalize_eps, want_means) and
gives (values, peaks, sums, means): one value a query, what its sum of exponentials was formed with, and, where wanted,
the value's slope along the query over the scale.  NAME_table_gradient takes (gradients of the values, those tensors,
peaks, sums, scale, normalize_eps, want_table, want_bias).

Shapes: T queries, I table rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def table_gradient_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The fake of NAME_table_gradient: (I, D) in the table's dtype and (I,) float32, empty where not wanted."""
    _, _, table, *_, want_table, want_bias = inputs
    catalogue, width = table.shape
    return (
        table.new_empty(catalogue if want_table else 0, width),
        table.new_empty(catalogue if want_bias else 0, dtype=torch.float32),
    )


def register_autograd(name: str) -> None:
    """Makes gr_kernels::NAME differentiable, once, in queries, table and bias."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, means_TD = ctx.saved_tensors
        queries, _, bias = tensors[:3]
        grad_T = grads[0]
        want_queries, want_table, want_bias = ctx.needs_input_grad[:3]
        grad_queries = grad_table = grad_bias = None
        if want_queries:
            grad_queries = (means_TD * (grad_T * ctx.scale)[:, None]).to(queries.dtype)
        if want_table or want_bias:
            operator = getattr(torch.ops.gr_kernels, f"{name}_table_gradient")
            table_ID, bias_I = operator(grad_T, *tensors, ctx.scale, ctx.normalize_eps, want_table, want_bias)
            grad_table = table_ID if want_table else None
            grad_bias = bias_I.to(bias.dtype) if want_bias else None
        return grad_queries, grad_table, grad_bias, *[None] * (len(ctx.needs_input_grad) - 3)

    torch.library.register_autograd(f"gr_kernels::{name}", backward, setup_context=_save)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.normalize_eps, _ = inputs
    _, *formed_with = output
    ctx.save_for_backward(*tensors, *formed_with)
    ctx.mark_non_differentiable(*formed_with)
    ctx.set_materialize_grads(False)
