"""The definitions, in plain torch, differentiated by autograd: all T x I logits at once.

Shapes: T queries, I catalogue size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logits(
    queries_TD: Tensor, table_ID: Tensor, scale: float, normalize_eps: float | None, bias_I: Tensor | None
) -> Tensor:
    """(T, I) ``scale * q . e + bias``, e divided by max(|e|, eps) on request."""
    if normalize_eps is not None:
        table_ID = F.normalize(table_ID, dim=-1, eps=normalize_eps)
    logits_TI = scale * (queries_TD @ table_ID.t())
    return logits_TI if bias_I is None else logits_TI + bias_I


def log_partition(
    queries_TD: Tensor,
    table_ID: Tensor,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
) -> Tensor:
    """(T,) log of the sum of exp(logits) over the catalogue."""
    return torch.logsumexp(logits(queries_TD, table_ID, scale, normalize_eps, bias_I), dim=1)


def cross_entropy(
    queries_TD: Tensor,
    table_ID: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
) -> Tensor:
    """Scalar: the weighted sum of negative log-likelihoods of the targets."""
    losses_T = F.cross_entropy(
        logits(queries_TD, table_ID, scale, normalize_eps, bias_I), targets_T.long(), reduction="none"
    )
    return (losses_T if weights_T is None else losses_T * weights_T).sum()
