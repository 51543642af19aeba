"""Triton kernel of jagged dropout: a program a tile of rows and columns; forward and backward are the same."""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.triton_common.random import interleave, words


@triton.jit(do_not_specialize=["key_low", "key_high", "drop_below", "rows"])
def drop(
    x_ptr, out_ptr, numbers_ptr,
    key_low: tl.uint32, key_high: tl.uint32, drop_below: tl.uint32, keep_scale, rows, width,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x keep_scale where the word of (row, column) is at least ``drop_below``, else 0. Keys are 32-bit halves.

    numbers_ptr: (rows,) int64 by which rows count, or None: by their place.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_C
    block = (first // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)
    number = row
    if numbers_ptr is not None:
        number = tl.load(numbers_ptr + row, mask=row < rows, other=0)
    low = (number & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (number >> 32).to(tl.uint32)[:, None]
    zero = tl.zeros([BLOCK_R, BLOCK_C // 4], tl.uint32)
    # the casts are the interpreter's, which knows no argument types
    w0, w1, w2, w3 = words(
        key_low.to(tl.uint32), key_high.to(tl.uint32), zero, zero + block[None, :], zero + low, zero + high
    )  # fmt: skip
    least = drop_below.to(tl.uint32)
    kept = interleave(
        (w0 >= least).to(tl.int8), (w1 >= least).to(tl.int8), (w2 >= least).to(tl.int8), (w3 >= least).to(tl.int8)
    )  # fmt: skip
    column = first + tl.arange(0, BLOCK_C)
    here = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0)
    value = tl.where(kept != 0, x.to(tl.float32) * keep_scale, 0.0)
    tl.store(out_ptr + at, value.to(x.dtype), mask=here)
