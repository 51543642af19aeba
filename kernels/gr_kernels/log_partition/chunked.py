"""Any device and dtype, in PyTorch operations, a chunk of queries at a time: autograd functions over GEMMs.

Shapes: T queries, I catalogue size, D width, C queries of a chunk. At most ``max_scores`` logits exist at once.
Logits and sums are float32 (float64 for float64 inputs), whatever the inputs' precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_BLOCK = 1 << 19  # logits of a chunk on CPU: a few MB, which stay in cache between the passes over them


def log_partition(
    queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None, scale: float, max_scores: int
) -> Tensor:
    return _LogPartition.apply(queries_TD, table_ID, bias_I, scale, max_scores)


def cross_entropy(
    queries_TD: Tensor,
    table_ID: Tensor,
    bias_I: Tensor | None,
    targets_T: Tensor,
    weights_T: Tensor | None,
    scale: float,
    max_scores: int,
) -> Tensor:
    return _CrossEntropy.apply(queries_TD, table_ID, bias_I, targets_T, weights_T, scale, max_scores)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None, scale: float, max_scores: int
    ) -> Tensor:
        ctx.scale, ctx.max_scores = scale, max_scores
        want_queries, want_table, want_bias = ctx.needs_input_grad[:3]
        queries_alone = want_queries and not (want_table or want_bias)
        log_sums_T = _accumulator(queries_TD, queries_TD.shape[0])
        grad_queries_TD = torch.empty_like(queries_TD) if queries_alone else None
        with _full_precision(queries_TD):
            for chunk in _chunks(queries_TD, table_ID, max_scores):
                logits_CI = _logits(queries_TD[chunk], table_ID, bias_I, scale)
                peaks_C, sums_C = _exponentiate(logits_CI)
                log_sums_T[chunk] = peaks_C + sums_C.log()
                if grad_queries_TD is not None:
                    shares_CI = logits_CI.div_(sums_C[:, None])
                    grad_queries_TD[chunk] = shares_CI.to(table_ID.dtype) @ table_ID * scale
        if queries_alone:
            ctx.save_for_backward(grad_queries_TD)
        else:
            ctx.save_for_backward(queries_TD, table_ID, bias_I)
        ctx.queries_alone = queries_alone
        return log_sums_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_T,) = grads
        if ctx.queries_alone:
            (grad_queries_TD,) = ctx.saved_tensors
            return (grad_queries_TD * grad_T[:, None]).to(grad_queries_TD.dtype), None, None, None, None
        queries_TD, table_ID, bias_I = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad, queries_TD, table_ID, bias_I, ctx.scale)
        with _full_precision(queries_TD):
            for chunk in _chunks(queries_TD, table_ID, ctx.max_scores):
                logits_CI = _logits(queries_TD[chunk], table_ID, bias_I, ctx.scale)
                _, sums_C = _exponentiate(logits_CI)
                gradients.add(chunk, logits_CI.mul_((grad_T[chunk] / sums_C)[:, None]))
        return *gradients.results(), None, None


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
        max_scores: int,
    ) -> Tensor:
        losses_T = _accumulator(queries_TD, queries_TD.shape[0])
        weights = None if weights_T is None else weights_T.to(losses_T.dtype)
        gradients = None
        if any(ctx.needs_input_grad[:3]):
            gradients = _Gradients(ctx.needs_input_grad, queries_TD, table_ID, bias_I, scale)
        with _full_precision(queries_TD):
            for chunk in _chunks(queries_TD, table_ID, max_scores):
                logits_CI = _logits(queries_TD[chunk], table_ID, bias_I, scale)
                targets_C1 = targets_T[chunk, None]
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
        return losses_T.sum() if weights is None else (losses_T * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled = [None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors]
        return *scaled, None, None, None, None


class _Gradients:
    """Sums the gradients of queries, table and bias from chunks of logit gradients."""

    def __init__(
        self,
        wanted: tuple[bool, ...],
        queries_TD: Tensor,
        table_ID: Tensor,
        bias_I: Tensor | None,
        scale: float,
    ) -> None:
        self.inputs_TD, self.table_ID, self.scale = queries_TD, table_ID, scale
        self.queries_TD = torch.empty_like(queries_TD) if wanted[0] else None
        # float32 sums for 16-bit inputs: hundreds of chunks are added up here
        self.sums_ID = _accumulator(table_ID, *table_ID.shape).zero_() if wanted[1] else None
        self.bias_I = None
        if bias_I is not None and wanted[2]:
            self.bias_I, self.bias_dtype = _accumulator(bias_I, bias_I.shape[0]).zero_(), bias_I.dtype

    def add(self, chunk: slice, grad_CI: Tensor) -> None:
        """Takes the gradient of the logits of one chunk of queries (and may not be given it again)."""
        if self.bias_I is not None:
            self.bias_I += grad_CI.sum(0)
        grad_CI = grad_CI.to(self.table_ID.dtype)
        if self.queries_TD is not None:
            out_CD = self.queries_TD[chunk]
            torch.addmm(out_CD, grad_CI, self.table_ID, beta=0, alpha=self.scale, out=out_CD)
        if self.sums_ID is None:
            return
        if self.sums_ID.dtype == grad_CI.dtype:
            self.sums_ID.addmm_(grad_CI.t(), self.inputs_TD[chunk], alpha=self.scale)
        else:
            self.sums_ID += (grad_CI.t() @ self.inputs_TD[chunk]) * self.scale

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        table_ID = None if self.sums_ID is None else self.sums_ID.to(self.table_ID.dtype)
        return self.queries_TD, table_ID, None if self.bias_I is None else self.bias_I.to(self.bias_dtype)


def _logits(queries_CD: Tensor, table_ID: Tensor, bias_I: Tensor | None, scale: float) -> Tensor:
    """(C, I) logits, in float32 at least."""
    logits_CI = torch.mm(queries_CD * scale, table_ID.t())
    if logits_CI.dtype in (torch.float16, torch.bfloat16):
        logits_CI = logits_CI.float()
    return logits_CI if bias_I is None else logits_CI.add_(bias_I)


def _exponentiate(logits_CI: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the logits into exp(logit - row's largest), in place; returns the largest and the sums, (C,) each.

    Shares are exponentials over their sum, not exp(logit - log-sum-exp): the latter, a number of the size of the
    logits, would bring its rounding into every share.
    """
    peaks_C = logits_CI.amax(dim=1)
    logits_CI.sub_(peaks_C[:, None]).exp_()
    return peaks_C, logits_CI.sum(dim=1)


def _accumulator(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=like.device)


def _full_precision(like: Tensor) -> torch.autocast:
    """The inputs' own dtype is the precision of the GEMMs: autocast would round the logits to 16 bits."""
    return torch.autocast(like.device.type, enabled=False)


def _chunks(queries_TD: Tensor, table_ID: Tensor, max_scores: int) -> list[slice]:
    count, catalogue = queries_TD.shape[0], max(1, table_ID.shape[0])
    limit = (
        min(max_scores, max(_CPU_BLOCK, 64 * catalogue)) if queries_TD.device.type == "cpu" else max_scores
    )
    step = max(1, limit // catalogue)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
