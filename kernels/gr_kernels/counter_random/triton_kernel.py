"""Triton kernel of counter-based random numbers: a lane a block of four draws, every draw written once."""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.triton_common.random import interleave, words


@triton.jit(do_not_specialize=["key_low", "key_high", "high", "rows"])
def draw(
    out_ptr, ordinals_ptr, positions_ptr, key_low: tl.uint32, key_high: tl.uint32, high: tl.uint64, rows, draws,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[t, d] of word d mod 4 of counter (positions[t], d div 4, ordinals[t] low, ordinals[t] high).

    The type of out says what becomes of a word: int32 or int64 the integer (word high) >> 32, float32 a number of
    [0, 1), float64 one of (-1, 1). positions_ptr may be None: all 0. A program takes BLOCKS blocks of the flat index
    row * blocks of a row + block, so that short and long rows of draws cost the same; the keys are 32-bit halves.
    """
    row_blocks = (draws + 3) // 4
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    first_row = first // row_blocks
    # from the first row's start on, 32 bits number the blocks: one division of 64 bits a program
    flat = (first - first_row * row_blocks).to(tl.int32) + tl.arange(0, BLOCKS)
    row = first_row + flat // row_blocks
    block = flat % row_blocks
    inside = row < rows

    ordinal = tl.load(ordinals_ptr + row, mask=inside, other=0)
    position = tl.zeros([BLOCKS], tl.int64)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + row, mask=inside, other=0)
    # the casts of the scalars are the interpreter's, which knows no argument types
    w0, w1, w2, w3 = words(
        key_low.to(tl.uint32),
        key_high.to(tl.uint32),
        (position & 0xFFFFFFFF).to(tl.uint32),
        block.to(tl.uint32),
        (ordinal & 0xFFFFFFFF).to(tl.uint32),
        ((ordinal >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    word = interleave(w0[:, None], w1[:, None], w2[:, None], w3[:, None])

    kind: tl.constexpr = out_ptr.dtype.element_ty
    if kind == tl.float32:
        value = (word >> 8).to(tl.float32) * 2.0**-24
    elif kind == tl.float64:
        value = (2 * word.to(tl.int64) + 1).to(tl.float64) * 2.0**-32 - 1.0
    else:
        value = ((word.to(tl.uint64) * high.to(tl.uint64)) >> 32).to(kind)
    column = 4 * block[:, None] + tl.arange(0, 4)[None, :]
    at = row[:, None] * draws + column
    tl.store(out_ptr + at, value, mask=inside[:, None] & (column < draws))
