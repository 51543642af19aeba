"""Between jagged rows (T, ...) and sequences padded on the right to N (B, N, ...), as peers without jagged input need.

The index is made once and not timed; moving the rows is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index(offsets_B1: Tensor, N: int) -> Tensor:
    """(T,) int64: row t of the batch is row index[t] of the padded (B N, ...) tensor."""
    lengths_B = offsets_B1.diff()
    sequences_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
    rows_T = torch.arange(len(sequences_T), device=lengths_B.device)
    return sequences_T * N + rows_T - offsets_B1[:-1][sequences_T]


def pad(x: Tensor, index_T: Tensor, B: int, N: int) -> Tensor:
    """(T, ...) to (B, N, ...), zeros elsewhere; a view where every sequence is full."""
    if x.shape[0] == B * N:
        return x.view(B, N, *x.shape[1:])
    return x.new_zeros(B * N, *x.shape[1:]).index_copy(0, index_T, x).view(B, N, *x.shape[1:])


def unpad(x: Tensor, index_T: Tensor) -> Tensor:
    """(B, N, ...) to (T, ...)."""
    flat = x.flatten(0, 1)
    return flat if flat.shape[0] == len(index_T) else flat.index_select(0, index_T)
