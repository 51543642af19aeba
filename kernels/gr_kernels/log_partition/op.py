"""Sums over the whole catalogue, a part of the T x I logits at a time: log-partition function and cross-entropy.

Shapes: T queries, I catalogue size, D width. Logits and sums are float32 (float64 for float64 inputs), whatever the
inputs' precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.log_partition import chunked, cpp

MAX_SCORES = 1 << 24
IMPLEMENTATIONS = ("auto", "cpp", "chunked")


@dataclass(frozen=True)
class Plan:
    """The way chosen for one call, and the reason in a sentence."""

    implementation: str
    why: str


def explain(queries_TD: Tensor, bias_I: Tensor | None = None) -> Plan:
    """How the functions below compute these inputs under 'auto', and why."""
    why_not = cpp.why_not(queries_TD, bias_I)
    if why_not:
        return Plan("chunked", f"GEMMs over chunks of queries: {why_not}")
    return Plan("cpp", "float32 on cpu: logits, softmax and gradients in one pass of the C++ operator")


def log_partition(
    queries_TD: Tensor,
    table_ID: Tensor,
    *,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    max_scores: int = MAX_SCORES,
    implementation: str = "auto",
) -> Tensor:
    """log sum_i exp(scale * q_t . e_i + bias_i), the sum over the whole catalogue.

    queries_TD: (T, D); table_ID: (I, D), of the same float dtype; scale: 1 / temperature; normalize_eps: divide
    each e_i by max(|e_i|, eps); bias_I: (I,) added to the logits. Differentiable once in queries, table and bias.
    implementation: 'auto' (see ``explain``), 'cpp' (float32 on CPU), 'chunked'; max_scores: the most logits 'chunked'
    holds at once ('cpp': 2^18 a block, see README.md).

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
    if _choose(implementation, queries_TD, bias_I) == "cpp":
        return cpp.log_partition(queries_TD, table_ID, bias_I, scale)
    return chunked.log_partition(queries_TD, table_ID, bias_I, scale, max_scores)


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
    implementation: str = "auto",
) -> Tensor:
    """sum_t w_t (log sum_i exp(logit_ti) - logit_t,target), logit = scale * q . e + bias.

    targets_T: (T,) integer rows of the table; weights_T: (T,) constants (1 where None), not differentiated. The
    rest as in ``log_partition``. The weights being known, gradients are formed in the forward pass
    (3 GEMMs in all) and multiplied by the scalar upstream gradient in the backward pass.

    Returns a float32 scalar (float64 for float64 inputs). Raises IndexError (on CPU) for the first target outside
    the table, ValueError or TypeError for inputs that don't fit.
    """
    _check(queries_TD, table_ID, bias_I, normalize_eps, max_scores)
    _check_targets(targets_T, weights_T, queries_TD.shape[0], table_ID.shape[0])
    if normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=normalize_eps)
    queries_TD, table_ID, bias_I = _heeding_no_grad(queries_TD, table_ID, bias_I)
    targets_T = targets_T.long()
    if _choose(implementation, queries_TD, bias_I) == "cpp":
        return cpp.cross_entropy(queries_TD, table_ID, bias_I, targets_T, weights_T, scale)
    return chunked.cross_entropy(queries_TD, table_ID, bias_I, targets_T, weights_T, scale, max_scores)


def _choose(implementation: str, queries_TD: Tensor, bias_I: Tensor | None) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}"
        )
    if implementation == "auto":
        return explain(queries_TD, bias_I).implementation
    why_not = cpp.why_not(queries_TD, bias_I) if implementation == "cpp" else ""
    if why_not:
        raise ValueError(f"implementation 'cpp' can't run here: {why_not}")
    return implementation


def _heeding_no_grad(
    queries_TD: Tensor, table_ID: Tensor, bias_I: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Detached inputs where no gradient is recorded: a Function would still see that they require one."""
    if torch.is_grad_enabled():
        return queries_TD, table_ID, bias_I
    return queries_TD.detach(), table_ID.detach(), None if bias_I is None else bias_I.detach()


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
