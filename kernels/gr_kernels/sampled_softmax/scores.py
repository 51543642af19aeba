"""Any device and dtype, in PyTorch operations: the candidates' scores, then the cross-entropy of the target's.

A query's own negatives have their scores of gr_kernels.candidate_scores (on CPU of the C++ operator). Shared ones are
scored by GEMMs, a chunk of queries at a time: at most ``max_scores`` scores exist at once. The loss is a sum whose
weights are known, so either way the gradients of the scores are formed with it: of T x K x D three GEMMs in all.

Shapes: T queries, K negatives, I table rows, D width, C queries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.log_partition.chunked import Gradients, accumulator, chunks, scaled_scores
from gr_kernels.log_partition.problem import Problem as Partition
from gr_kernels.logits import full, full_precision, total
from gr_kernels.sampled_softmax.problem import Problem

_HIDDEN = -1e30  # added to the score of a negative that is the target: its share is exactly zero


def sampled_softmax(problem: Problem) -> Tensor:
    """The sum of the losses: a scalar."""
    with full_precision(problem.queries):
        problem = problem.widened()
        return _shared(problem) if problem.shared else _own(problem)


def _own(problem: Problem) -> Tensor:
    targets_T1 = problem.targets.to(problem.negatives.dtype)[:, None]
    rows = torch.cat([targets_T1, problem.negatives], dim=1)  # (T, 1 + K)
    scaled_TD = problem.queries * problem.scale  # T x D numbers, rather than the T x K scores
    scores = full(candidate_scores(scaled_TD, problem.table, rows, normalize_eps=problem.normalize_eps))
    if problem.bias is not None:
        scores = scores + problem.bias[rows]
    return cross_entropy_of_first(scores, rows, targets_T1, problem.weights)


def _shared(problem: Problem) -> Tensor:
    rows_KD, labels_TD = problem.gathered()
    bias_T = None if problem.bias is None else problem.bias[problem.targets]
    if len(problem.negatives) == 0:
        logits_T = (full(problem.queries) * full(labels_TD)).sum(1) * problem.scale
        return total((logits_T if bias_T is None else logits_T + bias_T) * 0.0, problem.weights)
    return _OfShared.apply(problem.queries, rows_KD, labels_TD, problem.negative_bias(), bias_T, problem)


def cross_entropy_of_first(
    logits: Tensor, rows: Tensor, targets_T1: Tensor, weights_T: Tensor | None = None
) -> Tensor:
    """Sum over t of ``w_t (log(exp l_t0 + sum_{k > 0, row_tk != target_t} exp l_tk) - l_t0)``: a scalar.

    logits: (T, 1 + K), the target's score first.  rows: (T, 1 + K), the item rows that the scores are of; column 0 is
    not read.  targets_T1: of the dtype of ``rows``.  Differentiable once, in few passes over the scores.
    """
    return _OfFirst.apply(logits, rows, targets_T1, weights_T)


def _equal(rows: Tensor, targets_C1: Tensor, like: Tensor) -> Tensor:
    """1.0 where a row is its query's target, else 0.0, in the dtype and shape of ``like``.

    Comparing into floats and adding is several times faster on the CPU than filling through a boolean mask.
    """
    hidden = torch.empty_like(like)
    torch.eq(rows, targets_C1, out=hidden)
    return hidden


class _OfFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, targets_T1: Tensor, weights_T: Tensor | None
    ) -> Tensor:
        hidden = _equal(rows, targets_T1, logits)
        hidden[:, 0] = 0.0
        log_shares = torch.add(logits, hidden, alpha=_HIDDEN, out=hidden).log_softmax(dim=1)
        loss = total(-log_shares[:, 0], weights_T)
        if ctx.needs_input_grad[0]:
            grad = log_shares.exp_()
            grad[:, 0] -= 1.0
            ctx.save_for_backward(grad if weights_T is None else grad.mul_(weights_T[:, None]))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None


class _OfShared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_TD: Tensor,
        rows_KD: Tensor,
        labels_TD: Tensor,
        bias_K: Tensor | None,
        bias_T: Tensor | None,
        problem: Problem,
    ) -> Tensor:
        want_queries, want_rows, want_labels, want_bias = ctx.needs_input_grad[:4]
        losses_T = accumulator(queries_TD, queries_TD.shape[0])
        slopes_T = torch.empty_like(losses_T)  # d loss / d logit of the target
        negatives = Partition(
            queries=queries_TD, table=rows_KD, scale=problem.scale, normalize_eps=None, bias=bias_K,
            max_scores=problem.max_scores, excluded=None, names=None,
        )  # fmt: skip
        gradients = Gradients((want_queries, want_rows, want_bias), negatives)
        wanted = any(ctx.needs_input_grad[:5])
        for chunk in chunks(queries_TD, rows_KD, problem.max_scores):
            scaled_CD = queries_TD[chunk].to(losses_T.dtype) * problem.scale
            label_C = (scaled_CD * labels_TD[chunk].to(losses_T.dtype)).sum(1)
            if bias_T is not None:
                label_C = label_C + bias_T[chunk]
            scores_CK = scaled_scores(queries_TD[chunk], rows_KD, problem.scale)
            if bias_K is not None:
                scores_CK = scores_CK.add_(bias_K)
            hidden_CK = _equal(problem.negatives, problem.targets[chunk, None], scores_CK)
            scores_CK.add_(hidden_CK, alpha=_HIDDEN)
            peak_C = torch.maximum(scores_CK.amax(dim=1), label_C)
            shares_CK = scores_CK.sub_(peak_C[:, None]).exp_()
            own_C = (label_C - peak_C).exp()
            sums_C = shares_CK.sum(dim=1) + own_C
            losses_T[chunk] = (peak_C - label_C) + sums_C.log()
            if not wanted:
                continue
            weights_C = 1.0 if problem.weights is None else problem.weights[chunk].to(losses_T.dtype)
            slopes_T[chunk] = (own_C / sums_C - 1.0) * weights_C
            gradients.add(chunk, shares_CK.mul_((weights_C / sums_C)[:, None]))
        if wanted:
            grad_TD, grad_KD, grad_K = gradients.results()
            toward_TD = slopes_T[:, None] * problem.scale
            if grad_TD is not None:
                grad_TD = (grad_TD + toward_TD * labels_TD).to(queries_TD.dtype)
            grad_labels_TD = (toward_TD * queries_TD).to(labels_TD.dtype) if want_labels else None
            grad_T = slopes_T.to(bias_T.dtype) if bias_T is not None and ctx.needs_input_grad[4] else None
            ctx.save_for_backward(grad_TD, grad_KD, grad_labels_TD, grad_K, grad_T)
        return total(losses_T, problem.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *known, bias_T = (None if g is None else (g * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return *known, bias_T, None
