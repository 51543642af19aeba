"""Shared negatives in PyTorch operations, a chunk of queries at a time: at most ``max_scores`` scores exist at once.

The loss is a sum whose weights are known, so its gradients are formed with it: three GEMMs of T x K x D in all.

Shapes: T queries, K negatives, D width, C queries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels.log_partition.chunked import Gradients, accumulator, chunks, scaled_scores
from gr_kernels.log_partition.problem import Problem as Partition
from gr_kernels.sampled_softmax.problem import Problem

_HIDDEN = -1e30  # added to the score of a negative that is the target: its share is exactly zero


def shared_loss(problem: Problem, rows_KD: Tensor, labels_TD: Tensor, bias_T: Tensor | None) -> Tensor:
    """The sum of the losses, a scalar, for K > 0 negatives; differentiable once.

    rows, labels: the vectors of negatives and targets, normalised where asked.  bias_T: of the targets.
    """
    return _SharedLoss.apply(problem.queries, rows_KD, labels_TD, problem.negative_bias(), bias_T, problem)


class _SharedLoss(torch.autograd.Function):
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
            # comparing into floats and adding is several times faster on the CPU than filling through booleans
            hidden_CK = torch.empty_like(scores_CK)
            torch.eq(problem.negatives, problem.targets[chunk, None], out=hidden_CK)
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
        return problem.total(losses_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *known, bias_T = (None if g is None else (g * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return *known, bias_T, None
