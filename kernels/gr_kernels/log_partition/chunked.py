"""Any device and dtype, in PyTorch operations, a chunk of queries at a time: autograd functions over GEMMs.

Shapes: T queries, I catalogue size, D width, C queries of a chunk. At most ``max_scores`` logits exist at once.
Logits and sums are float32 (float64 for float64 inputs), whatever the inputs' precision. Sums over the catalogue are
made in blocks (gr_kernels/products.py), so that chunks of few queries, which the CPU's BLAS may add up one item after
the other, are as exact as large ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels import rows
from gr_kernels.log_partition.problem import Problem
from gr_kernels.logits import full_precision, total
from gr_kernels.products import NARROW, sum_of_rows, wide_product

_CPU_BLOCK = 1 << 19  # logits of a chunk on CPU: a few MB, which stay in cache between the passes over them


def log_partition(problem: Problem) -> Tensor:
    problem = problem.widened().with_normalized_table()
    return _LogPartition.apply(problem.queries, problem.table, problem.bias, problem)


def cross_entropy(problem: Problem) -> Tensor:
    problem = problem.widened().with_normalized_table()
    return _CrossEntropy.apply(problem.queries, problem.table, problem.bias, problem)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None, problem: Problem
    ) -> Tensor:
        ctx.problem = problem
        want_queries, want_table, want_bias = ctx.needs_input_grad[:3]
        queries_alone = want_queries and not (want_table or want_bias)
        log_sums_T = accumulator(queries_TD, queries_TD.shape[0])
        grad_queries_TD = torch.empty_like(queries_TD) if queries_alone else None
        with full_precision(queries_TD):
            for chunk in chunks(queries_TD, table_ID, problem.max_scores):
                logits_CI = _logits(problem, chunk)
                peaks_C, sums_C = _exponentiate(logits_CI)
                log_sums_T[chunk] = peaks_C + sums_C.log()
                if grad_queries_TD is not None:
                    shares_CI = logits_CI.div_(_divisors(sums_C)[:, None])
                    shares_CI = shares_CI.to(table_ID.dtype)
                    sum_of_rows(shares_CI, table_ID, problem.scale, grad_queries_TD[chunk])
        if queries_alone:
            ctx.save_for_backward(grad_queries_TD)
        else:
            ctx.save_for_backward(queries_TD, table_ID, bias_I)
        ctx.queries_alone = queries_alone
        return log_sums_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_T,) = grads
        if ctx.queries_alone:
            (grad_queries_TD,) = ctx.saved_tensors
            return (grad_queries_TD * grad_T[:, None]).to(grad_queries_TD.dtype), None, None, None
        queries_TD, table_ID, bias_I = ctx.saved_tensors
        problem = replace(ctx.problem, queries=queries_TD, table=table_ID, bias=bias_I)
        gradients = Gradients(ctx.needs_input_grad, problem)
        with full_precision(queries_TD):
            for chunk in chunks(queries_TD, table_ID, problem.max_scores):
                logits_CI = _logits(problem, chunk)
                _, sums_C = _exponentiate(logits_CI)
                factors_C = grad_T[chunk] / _divisors(sums_C)
                gradients.add(chunk, logits_CI.mul_(factors_C[:, None]))
        return *gradients.results(), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None, problem: Problem
    ) -> Tensor:
        assert problem.targets is not None
        losses_T = accumulator(queries_TD, queries_TD.shape[0])
        weights = None if problem.weights is None else problem.weights.to(losses_T.dtype)
        gradients = Gradients(ctx.needs_input_grad, problem) if any(ctx.needs_input_grad[:3]) else None
        with full_precision(queries_TD):
            for chunk in chunks(queries_TD, table_ID, problem.max_scores):
                logits_CI = _logits(problem, chunk)
                targets_C1 = problem.targets[chunk, None].long()
                label_C = logits_CI.gather(1, targets_C1).squeeze(1)
                peaks_C, sums_C = _exponentiate(logits_CI)
                losses_T[chunk] = (peaks_C - label_C) + sums_C.log()
                if gradients is None:
                    continue
                weights_C = torch.ones_like(sums_C) if weights is None else weights[chunk]
                grad_CI = logits_CI.mul_((weights_C / sums_C)[:, None])
                grad_CI.scatter_add_(1, targets_C1, -weights_C[:, None])
                gradients.add(chunk, grad_CI)
        if gradients is not None:
            ctx.save_for_backward(*gradients.results())
        return total(losses_T, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return *(None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors), None


class Gradients:
    """Sums the gradients of queries, table and bias from chunks of logit gradients."""

    def __init__(self, wanted: tuple[bool, ...], problem: Problem) -> None:
        self.inputs_TD, self.table_ID, self.scale = problem.queries, problem.table, problem.scale
        self.queries_TD = torch.empty_like(self.inputs_TD) if wanted[0] else None
        # float32 sums for 16-bit inputs: hundreds of chunks are added up here
        self.sums_ID = accumulator(self.table_ID, *self.table_ID.shape).zero_() if wanted[1] else None
        self.bias_I = None
        if problem.bias is not None and wanted[2]:
            bias = problem.bias
            self.bias_I, self.bias_dtype = accumulator(bias, bias.shape[0]).zero_(), bias.dtype

    def add(self, chunk: slice, grad_CI: Tensor) -> None:
        """Takes the gradient of the logits of one chunk of queries (and may not be given it again)."""
        if self.bias_I is not None:
            self.bias_I += grad_CI.sum(0)
        grad_CI = grad_CI.to(self.table_ID.dtype)
        if self.queries_TD is not None:
            sum_of_rows(grad_CI, self.table_ID, self.scale, self.queries_TD[chunk])
        if self.sums_ID is None:
            return
        if self.sums_ID.dtype == grad_CI.dtype:
            self.sums_ID.addmm_(grad_CI.t(), self.inputs_TD[chunk], alpha=self.scale)
        else:
            self.sums_ID += (grad_CI.t() @ self.inputs_TD[chunk]) * self.scale

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        table_ID = None if self.sums_ID is None else self.sums_ID.to(self.table_ID.dtype)
        return self.queries_TD, table_ID, None if self.bias_I is None else self.bias_I.to(self.bias_dtype)


def _logits(problem: Problem, chunk: slice) -> Tensor:
    """(C, I) logits, in float32 at least; -inf for what a query doesn't see."""
    logits_CI = scaled_scores(problem.queries[chunk], problem.table, problem.scale)
    return problem.exclude(logits_CI if problem.bias is None else logits_CI.add_(problem.bias), chunk)


def scaled_scores(queries_CD: Tensor, table_ID: Tensor, scale: float) -> Tensor:
    """(C, I) scale * q . e in float32 at least.  Scaled where that rounds nothing to 16 bits."""
    if queries_CD.dtype in NARROW:
        return wide_product(queries_CD, table_ID.t()).mul_(scale)
    return wide_product(queries_CD * scale, table_ID.t())  # C x D numbers, rather than C x I


def _exponentiate(logits_CI: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the logits into exp(logit - row's largest), in place; returns the largest and the sums, (C,) each.

    Shares are exponentials over their sum, not exp(logit - log-sum-exp): the latter, a number of the size of the
    logits, would bring its rounding into every share.
    """
    peaks_C = logits_CI.amax(dim=1)
    peaks_C = peaks_C.masked_fill_(peaks_C == -torch.inf, 0.0)  # an empty sum: exp(-inf - 0) = 0
    logits_CI.sub_(peaks_C[:, None]).exp_()
    return peaks_C, logits_CI.sum(dim=1)


def _divisors(sums_C: Tensor) -> Tensor:
    """The sums, but for empty ones, whose terms are 0 whatever divides them."""
    return sums_C.masked_fill(sums_C == 0, 1.0)


def accumulator(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=like.device)


def chunks(queries_TD: Tensor, table_ID: Tensor, max_scores: int) -> list[slice]:
    """Chunks of queries with at most ``max_scores`` scores; on CPU few, but of no fewer than 64 queries for that."""
    if queries_TD.device.type == "cpu":
        max_scores = min(max_scores, max(_CPU_BLOCK, 64 * table_ID.shape[0]))
    return rows.chunks(queries_TD.shape[0], table_ID.shape[0], max_scores)
