"""Jagged dropout in plain PyTorch: any device, any dtype.

T rows, C columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gr_kernels.counter_random import uniform_integers


def drop_below(probability: float) -> int:
    """A number is kept when its 32-bit random word is at least this."""
    return math.ceil(probability * 2**32)


def keep_scale(probability: float) -> float:
    """What a kept number is multiplied by."""
    return 1.0 / (1.0 - probability)


def kept(row_T: Tensor, columns: int, probability: float, key: int) -> Tensor:
    """(T, C) bool: word c % 4 of Philox4x32-10 at counter (0, c // 4, row low, row high) is at least drop_below."""
    word_TC = uniform_integers(key, row_T, torch.zeros_like(row_T), columns, 2**32)
    return word_TC >= drop_below(probability)


def dropout(x: Tensor, probability: float, key: int, rows: Tensor | None = None) -> Tensor:
    """x with the numbers that aren't ``kept`` zeroed, the others times ``keep_scale``; contiguous."""
    row_T = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    kept_TC = kept(row_T, math.prod(x.shape[1:]), probability, key)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.where(kept_TC.view(x.shape), wide * keep_scale(probability), 0.0).to(x.dtype).contiguous()
