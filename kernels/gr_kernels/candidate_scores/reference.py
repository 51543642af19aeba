"""The definition, in plain PyTorch, differentiated by autograd: stores every gathered row (T x K x D).

Shapes: T queries, K candidates of a query, I catalogue size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def candidate_scores(
    queries_TD: Tensor, table_ID: Tensor, rows_TK: Tensor, normalize_eps: float | None = None
) -> Tensor:
    """(T, K) scores ``q_t . e_r``, or ``q_t . e_r / max(|e_r|, eps)``, r = rows[t, k]."""
    candidates_TKD = F.embedding(rows_TK.long(), table_ID)
    if normalize_eps is not None:
        candidates_TKD = F.normalize(candidates_TKD, dim=-1, eps=normalize_eps)
    return torch.einsum("td,tkd->tk", queries_TD, candidates_TKD)
