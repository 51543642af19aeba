"""The logits that losses over a table's rows have in common, and the sum of such losses.

Shapes: T queries, I table rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.products import NARROW
from gr_kernels.rows import check_inputs, check_kind, check_range


@dataclass(frozen=True, kw_only=True)
class Logits:
    """scale * q_t . e_i + bias_i.  max_scores: the most of them to be held at once."""

    queries: Tensor  # (T, D)
    table: Tensor  # (I, D)
    scale: float
    normalize_eps: float | None
    bias: Tensor | None  # (I,)
    max_scores: int

    def heeding_no_grad(self) -> Self:
        """Detached inputs where no gradient is recorded: a Function would still see that they require one."""
        if torch.is_grad_enabled():
            return self
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, queries=self.queries.detach(), table=self.table.detach(), bias=bias)

    def widened(self) -> Self:
        """On CPU, 16-bit queries and table in float32: PyTorch rounds 16-bit products there to 16 bits.

        Autograd rounds the gradients.  Two bytes more a number of the table, beside its dense gradient.
        """
        if self.queries.device.type != "cpu" or self.queries.dtype not in NARROW:
            return self
        return replace(self, queries=self.queries.float(), table=self.table.float())


def check_logits(logits: Logits) -> None:
    """Raises ValueError or TypeError, in one sentence, for arguments that don't fit."""
    check_inputs(logits.queries, logits.table, logits.normalize_eps)
    rows, bias = logits.table.shape[0], logits.bias
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must be ({rows},), one value a table row, not {tuple(bias.shape)}")
    if logits.max_scores < 1:
        raise ValueError(f"max_scores must be at least 1, got {logits.max_scores}")


def check_targets(targets_T: Tensor, weights_T: Tensor | None, count: int, catalogue: int) -> None:
    """Raises ValueError, TypeError or IndexError, in one sentence, for targets that don't fit ``count`` queries."""
    check_kind(targets_T, "targets")
    if targets_T.shape != (count,):
        raise ValueError(f"targets must be ({count},), one for each query, not {tuple(targets_T.shape)}")
    if weights_T is not None and weights_T.shape != (count,):
        raise ValueError(f"weights must be ({count},), one for each query, not {tuple(weights_T.shape)}")
    check_range(targets_T, catalogue, "target")


def total(losses_T: Tensor, weights_T: Tensor | None) -> Tensor:
    """The sum of the queries' losses, each times its weight: a scalar of the losses' dtype."""
    return losses_T.sum() if weights_T is None else (losses_T * weights_T.to(losses_T.dtype)).sum()


def full(scores: Tensor) -> Tensor:
    """Scores in float32 at least."""
    return scores.float() if scores.dtype in NARROW else scores


def normalized(rows: Tensor, eps: float) -> Tensor:
    """Rows (..., D) divided by max(their length, eps), in float32 at least and rounded once: eps is beyond float16."""
    return F.normalize(full(rows), dim=-1, eps=eps).to(rows.dtype)


def full_precision(like: Tensor) -> torch.autocast:
    """The inputs' own dtype is the precision of the GEMMs: autocast would round the logits to 16 bits."""
    return torch.autocast(like.device.type, enabled=False)
