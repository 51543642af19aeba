"""Triton kernels of jagged to padded and back: a program a tile of the rows written.

Triton doesn't specialise on what changes from batch to batch, all sizes but the width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.jagged.triton_rows import copy_rows, find_rows


@triton.jit(do_not_specialize=["fill", "rows", "places"])
def to_dense(
    x_ptr, dense_ptr, offsets_ptr, fill: tl.int64, rows, places, width,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rows = B N rows of the padded tensor, ``places`` = N of them a sequence."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    written = row < rows
    sequence = row // places
    place = row - sequence * places
    begin = tl.load(offsets_ptr + sequence, mask=written, other=0)
    end = tl.load(offsets_ptr + sequence + 1, mask=written, other=0)
    taken = written & (place < end - begin)
    copy_rows(x_ptr, begin + place, dense_ptr, row, taken, written, fill, width, BLOCK_C)


@triton.jit(do_not_specialize=["rows", "sequences", "places"])
def to_jagged(
    dense_ptr, out_ptr, offsets_ptr, rows, sequences, places, width,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rows = T; rows of no sequence, and those past the ``places`` padded ones, become zero."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sequence, place, _, inside = find_rows(offsets_ptr, sequences, row, STEPS)
    taken = inside & (place < places)
    source = sequence * places + place
    copy_rows(dense_ptr, source, out_ptr, row, taken, row < rows, tl.zeros([], tl.int32), width, BLOCK_C)
