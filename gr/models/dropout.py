"""Dropout from torch's own generator, with its random bits drawn four at a time on the CPU.

On the CPU torch draws one number of 32 bits or more for every value, which costs more than a layer's GEMM when
the width is small; here a 64-bit word serves four values.  On other devices it is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LEVELS = 1 << 16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """``x`` with each value zeroed with ``probability`` in training, the others scaled so that means are kept.

    On the CPU the probability is the nearest multiple of 2^-16, and the scale is that one's.
    """
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.dropout(x, probability, training=True)
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-2^15, 2^15)
    # comparing straight into floats and multiplying by them is several times faster than through booleans
    mask = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(draws, dropped - _LEVELS // 2, out=mask).mul_(_LEVELS / (_LEVELS - dropped))
    return x * mask
