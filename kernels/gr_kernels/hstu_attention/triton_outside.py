"""Zeros for the rows of a batch that no sequence holds."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS, COLUMNS = tl.constexpr(64), tl.constexpr(256)


@triton.jit(do_not_specialize=["sequences", "rows"])
def zero_outside_kernel(x, offsets, sequences: tl.int32, rows: tl.int64, width):
    """x[row] = 0 for the rows of a contiguous (rows, width) tensor before the first sequence and after the last."""
    begin, end = tl.load(offsets), tl.load(offsets + sequences)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outside = (row < rows) & ((row < begin) | (row >= end))
    if tl.sum(outside.to(tl.int32)) > 0:
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            there = outside[:, None] & (column < width)[None, :]
            zeros = tl.zeros((ROWS, COLUMNS), dtype=tl.float32).to(x.dtype.element_ty)
            tl.store(x + row[:, None] * width + column[None, :], zeros, mask=there)
