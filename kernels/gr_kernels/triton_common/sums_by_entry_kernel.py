"""Triton kernel: sums of rows by entry, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_rows_by_entry(
    values_ptr, order_ptr, starts_ptr, sums_ptr, entries, width, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[s, e] = the s-th of SPLITS parts of the sum of the rows of entry e: rows order[starts[e]] up to
    order[starts[e + 1]]. A program an entry, part and stretch of columns; the order of every sum is fixed."""
    entry = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(starts_ptr + entry)
    count = tl.load(starts_ptr + entry + 1) - start
    begin = start + count * part // SPLITS
    end = start + count * (part + 1) // SPLITS
    here = column < width
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(begin, end, BLOCK_R):
        at = first + tl.arange(0, BLOCK_R)
        row = tl.load(order_ptr + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & here[None, :]
        value = tl.load(values_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
        total += tl.sum(value.to(tl.float32), 0)
    tl.store(sums_ptr + (part * entries + entry) * width + column, total, mask=here)
