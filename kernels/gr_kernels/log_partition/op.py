"""Sums over the whole catalogue, a chunk of queries at a time: the log-partition function and the cross-entropy.

Shapes: T queries, I catalogue size, D width, C queries of a chunk. Neither ever holds more than ``max_scores``
logits. Logits and sums are float32 (float64 for float64 inputs), whatever the inputs' precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_SCORES = 1 << 24
_CPU_BLOCK = 1 << 19  # logits of a chunk on CPU: a few MB, which stay in cache between the passes over them


def log_partition(
    queries_TD: Tensor,
    table_ID: Tensor,
    *,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    max_scores: int = MAX_SCORES,
) -> Tensor:
    """log sum_i exp(scale * q_t . e_i + bias_i), the sum over the whole catalogue.

    queries_TD: (T, D); table_ID: (I, D), of the same float dtype; scale: 1 / temperature; normalize_eps: divide
    each e_i by max(|e_i|, eps); bias_I: (I,) added to the logits. Differentiable once in queries, table and bias.

    Costs one GEMM of T x I x D forward. Backward forms the logits again (3 more GEMMs), because the upstream
    gradient weighs the rows of the table's gradient; where the table and bias need none, the queries' gradient
    is formed in the forward pass (one more GEMM, none backward). For a loss whose weights are known beforehand
    ``cross_entropy`` does with 3 in all.

    Returns (T,) float32 (float64 for float64 inputs). Raises ValueError or TypeError for inputs that don't fit.
    """
    _check(queries_TD, table_ID, bias_I, normalize_eps, max_scores)
    if normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=normalize_eps)
    queries_TD, table_ID, bias_I = _heeding_no_grad(queries_TD, table_ID, bias_I)
    return _LogPartition.apply(queries_TD, table_ID, bias_I, scale, max_scores)


def cross_entropy(
    queries_TD: Tensor,
    table_ID: Tensor,
    targets_T: Tensor,
    *,
    weights_T: Tensor | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    max_scores: int = MAX_SCORES,
) -> Tensor:
    """sum_t w_t (log sum_i exp(logit_ti) - logit_t,target), logit = scale * q . e + bias.

    targets_T: (T,) integer rows of the table; weights_T: (T,) constants (1 where None), not differentiated. The
    rest as in ``log_partition``. The weights being known, gradients are formed chunk by chunk in the forward pass
    (3 GEMMs in all) and multiplied by the scalar upstream gradient in the backward pass.

    Returns a float32 scalar (float64 for float64 inputs). Raises IndexError (on CPU) for the first target outside
    the table, ValueError or TypeError for inputs that don't fit.
    """
    _check(queries_TD, table_ID, bias_I, normalize_eps, max_scores)
    _check_targets(targets_T, weights_T, queries_TD.shape[0], table_ID.shape[0])
    if normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=normalize_eps)
    queries_TD, table_ID, bias_I = _heeding_no_grad(queries_TD, table_ID, bias_I)
    return _CrossEntropy.apply(queries_TD, table_ID, bias_I, targets_T.long(), weights_T, scale, max_scores)


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


def _heeding_no_grad(
    queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Detached inputs where no gradient is recorded: a Function would still see that they require one."""
    if torch.is_grad_enabled():
        return queries_TD, table_ID, bias_I
    return queries_TD.detach(), table_ID.detach(), None if bias_I is None else bias_I.detach()


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


def _check(
    queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None, normalize_eps: float | None, max_scores: int
) -> None:
    if queries_TD.dim() != 2 or table_ID.dim() != 2 or queries_TD.shape[1] != table_ID.shape[1]:
        raise ValueError(
            "queries must be (T, D) and the table (I, D) with the same D, not "
            f"{tuple(queries_TD.shape)} and {tuple(table_ID.shape)}"
        )
    if queries_TD.dtype != table_ID.dtype or not queries_TD.dtype.is_floating_point:
        raise TypeError(
            f"queries and table must share a float dtype, not {queries_TD.dtype} and {table_ID.dtype}"
        )
    if table_ID.shape[0] == 0:
        raise ValueError("the table has no rows: there is nothing to sum over")
    if bias_I is not None and bias_I.shape != table_ID.shape[:1]:
        raise ValueError(
            f"bias must be ({table_ID.shape[0]},), one value a table row, not {tuple(bias_I.shape)}"
        )
    if normalize_eps is not None and not normalize_eps > 0:
        raise ValueError(
            f"normalize_eps must be positive (or None for plain inner products), got {normalize_eps}"
        )
    if max_scores < 1:
        raise ValueError(f"max_scores must be at least 1, got {max_scores}")


def _check_targets(targets_T: Tensor, weights_T: Tensor | None, count: int, catalogue: int) -> None:
    if targets_T.shape != (count,) or targets_T.is_floating_point():
        raise ValueError(
            f"targets must be ({count},) integers, not {tuple(targets_T.shape)} of {targets_T.dtype}"
        )
    if weights_T is not None and weights_T.shape != (count,):
        raise ValueError(f"weights must be ({count},), not {tuple(weights_T.shape)}")
    if targets_T.device.type != "cpu" or count == 0:
        return  # on an accelerator a look at the values would wait for it
    bad = ((targets_T < 0) | (targets_T >= catalogue)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise IndexError(
            f"target row {int(targets_T[first])} (query {first}) is outside the table of {catalogue} rows: "
            f"rows must lie in [0, {catalogue})"
        )
