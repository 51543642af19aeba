"""Jagged to padded and back in plain PyTorch: any device, any dtype.

B sequences, T rows, N places of the padded tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.jagged.offsets import places_of_rows, take_rows


def to_dense(x: Tensor, offsets_B1: Tensor, max_length: int, fill: float) -> Tensor:
    """(B, N, ...): row i of sequence b at [b, i], ``fill`` after its end."""
    place_N = torch.arange(max_length, device=x.device)
    inside_BN = place_N < offsets_B1.diff()[:, None]
    return take_rows(x, offsets_B1[:-1, None] + place_N, inside_BN, fill)


def to_jagged(dense: Tensor, offsets_B1: Tensor, rows: int) -> Tensor:
    """(T, ...): the rows of the sequences; those of no sequence, or past the padded ones, are zero."""
    max_length = dense.shape[1]
    sequence_T, place_T, inside_T = places_of_rows(offsets_B1, rows)
    inside_T = inside_T & (place_T < max_length)
    return take_rows(dense.flatten(0, 1), sequence_T * max_length + place_T, inside_T)
