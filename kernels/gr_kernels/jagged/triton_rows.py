"""Triton: which sequence a row belongs to, and copies of whole rows from wherever a kernel found them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upper_bound(table_ptr, count, x, STEPS: tl.constexpr):
    """How many of the ``count`` ascending int64 entries of a table are <= x (a block): int64.

    STEPS halvings reach any answer from 0 to count where 2^STEPS > count; those beyond load nothing.
    """
    low = tl.zeros_like(x).to(tl.int64)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        entry = tl.load(table_ptr + middle, mask=open_, other=0)
        right = open_ & (entry <= x)
        low = tl.where(right, middle + 1, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def find_rows(offsets_ptr, sequences, row, STEPS: tl.constexpr):
    """Of each row of a block: its sequence, its place in it, its sequence's length, and whether it has a sequence.

    For rows without one the sequence is 0 or the last, so that it can be used to load from (B,) tensors when B > 0;
    place and length then mean nothing.
    """
    found = upper_bound(offsets_ptr, sequences + 1, row, STEPS) - 1
    inside = (found >= 0) & (found < sequences)
    sequence = tl.minimum(tl.maximum(found, 0), tl.maximum(sequences - 1, 0))
    begin = tl.load(offsets_ptr + sequence, mask=inside, other=0)
    end = tl.load(offsets_ptr + sequence + 1, mask=inside, other=0)
    return sequence, row - begin, end - begin, inside


@triton.jit
def copy_rows(source_ptr, source_row, out_ptr, out_row, taken, written, fill, width, BLOCK_C: tl.constexpr):
    """out[out_row] = source[source_row] where ``taken``, else ``fill``; only where ``written``.

    Rows are int64 blocks; ``width`` numbers a row, of any type: they are moved, not computed with.
    """
    for first in range(0, width, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        here = (column < width)[None, :]
        from_ptr = source_ptr + source_row[:, None] * width + column[None, :]
        number = tl.load(from_ptr, mask=taken[:, None] & here, other=0)
        number = tl.where(taken[:, None], number, fill.to(number.dtype))
        tl.store(out_ptr + out_row[:, None] * width + column[None, :], number, mask=written[:, None] & here)
