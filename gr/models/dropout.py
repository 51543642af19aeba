"""Dropout, and where its random bits come from.

On GPUs from a counter: whether a value is dropped is a function of a key, its row and its column, decided again in
the backward pass, so that no mask is stored (gr_kernels.jagged).  On the CPU from torch's generator, four at a time,
because words of a counter cost fourteen times as much there; a key then changes nothing.

Where processes share sequences (gr/models/cut.py) each drops, of its rows, what one process would: a counter knows the
row's number in the whole micro-batch, and the generator draws for all rows on each of them.

Shapes: T rows, E numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.models.cut import Cut
from gr_kernels.dispatch import Implementation, preferred
from gr_kernels.jagged import jagged_dropout
from gr_kernels.jagged.dropout.op import IMPLEMENTATIONS
from gr_kernels.tracing import device_type, on_paper_now

_LEVELS = 1 << 16
_DRAWN = 1 << 20  # numbers at a time, where most of them are for other processes


def from_generator(device: torch.device, implementations: Sequence[Implementation]) -> bool:
    """Whether dropout on a device takes torch's generator: on the CPU, unless one of the operator's
    ``implementations`` is preferred."""
    return device_type(device) == "cpu" and preferred() not in {known.name for known in implementations}


class Dropout(nn.Module):
    """Zeroes values with ``probability`` in training and scales the others so that means are kept.

    A call's key, 64 bits, belongs to one place of the model in one micro-batch
    (``derive_key(layout.dropout_key, ...)``).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, key: int, cut: Cut | None = None) -> Tensor:
        """x: (T, ...) floating -> its shape and dtype; x itself when nothing can be dropped.  ``cut``: of the layout,
        where x has some of the rows only."""
        if not self.training or self.probability == 0.0:
            return x
        if from_generator(x.device, IMPLEMENTATIONS):
            return generator_dropout(x, self.probability, cut)
        return jagged_dropout(x, self.probability, key=key, rows=None if cut is None else cut.numbers_T)

    def extra_repr(self) -> str:
        return f"{self.probability}"


def generator_dropout(x: Tensor, probability: float, cut: Cut | None = None) -> Tensor:
    """Dropout of a CPU tensor with the bits of torch's generator.

    For float32 and float64 the probability is the nearest multiple of 2^-16, and the scale is that one's.  torch draws
    one number of 32 bits or more for every value, which costs more than a layer's GEMM when the width is small; here a
    64-bit word serves four values.
    """
    if x.dtype not in (torch.float32, torch.float64) and cut is None:
        return F.dropout(x, probability, training=True)
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    draws = _draws(x.numel()).view(x.shape) if cut is None else _draws_of(cut, x.shape)
    # comparing straight into floats and multiplying by them is several times faster than through booleans
    mask = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(draws, dropped - _LEVELS // 2, out=mask).mul_(_LEVELS / (_LEVELS - dropped))
    return x * mask


def _draws(count: int) -> Tensor:
    """(count,) int16, uniform in [-2^15, 2^15)."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    return words.view(torch.int16)[:count]


def _draws_of(cut: Cut, shape: Sequence[int]) -> Tensor:
    """This process's rows of what ``_draws`` gives for all rows of the micro-batch, a stretch of them at a time."""
    numbers = math.prod(shape[1:])
    drawn_TE = torch.empty(shape[0], numbers, dtype=torch.int16)
    step = max(_DRAWN // max(numbers, 1) // 4, 1) * 4  # rows, whose words are whole
    if on_paper_now():  # which has no numbers to find rows by
        _draws(min(step, cut.whole.rows) * numbers)
        return drawn_TE.view(tuple(shape))
    order_T = cut.numbers_T.argsort()
    sorted_T = cut.numbers_T[order_T]
    for first in range(0, cut.whole.rows, step):
        last = min(first + step, cut.whole.rows)
        every_RE = _draws((last - first) * numbers).view(last - first, numbers)
        begin, end = torch.searchsorted(sorted_T, torch.tensor([first, last])).tolist()
        drawn_TE[order_T[begin:end]] = every_RE[sorted_T[begin:end] - first]
    return drawn_TE.view(tuple(shape))
