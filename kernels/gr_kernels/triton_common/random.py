"""Philox4x32-10 in Triton kernels: the words of gr_kernels.counter_random and csrc/philox.h, bit for bit.

Counters and key halves are uint32. The arithmetic is Triton's own `philox_impl`, which on uint32 is the generator of
Salmon et al. ("Parallel random numbers: as easy as 1, 2, 3", SC 2011); what is here is how counters become tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(key_low, key_high, c0, c1, c2, c3):
    """The four words of every counter (c0, c1, c2, c3), all of one shape."""
    return tl.philox_impl(c0, c1, c2, c3, key_low, key_high)


@triton.jit
def interleave(w0, w1, w2, w3):
    """(R, C) tiles of words 0 to 3 of each block -> (R, 4 C): column c is word c mod 4 of block c div 4."""
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [r, c, word div 2, word mod 2]
    return tl.reshape(pairs, (w0.shape[0], 4 * w0.shape[1]))


@triton.jit
def kept(key_low, key_high, row, head, first_column, drop_last, COLUMNS: tl.constexpr):
    """(R, COLUMNS) booleans: the weights that dropout keeps, COLUMNS columns from `first_column`, a multiple of 4.

    row: (R,) uint32; head: an integer scalar. The weight of (row, head, column j) is decided by word j mod 4 of counter
    (row, head, j div 4, 0), and kept when the word exceeds `drop_last` = ceil(p 2^32) - 1, a uint32.
    """
    ROWS: tl.constexpr = row.shape[0]
    key_low, key_high = (
        key_low.to(tl.uint32),
        key_high.to(tl.uint32),
    )  # (the interpreter knows no argument types)
    drop_last = drop_last.to(tl.uint32)
    block = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    shape: tl.constexpr = (ROWS, COLUMNS // 4)
    c0 = tl.broadcast_to(row[:, None], shape)
    c2 = tl.broadcast_to(block[None, :], shape)
    zero = tl.zeros(shape, dtype=tl.uint32)
    w0, w1, w2, w3 = words(key_low, key_high, c0, (zero + head).to(tl.uint32), c2, zero)
    # One byte a decision is what moves between threads, not the words.
    bits = interleave(
        (w0 > drop_last).to(tl.int8),
        (w1 > drop_last).to(tl.int8),
        (w2 > drop_last).to(tl.int8),
        (w3 > drop_last).to(tl.int8),
    )
    return bits != 0
