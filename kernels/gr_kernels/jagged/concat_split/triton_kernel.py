"""Triton kernels of jagged concatenation and split: one part a launch, a program a tile of the rows written.

Part p has sequence b in rows offsets[b] to offsets[b + 1]. ``before`` holds the sum of the offsets of the parts before
p (so that before[b + 1] - before[b] of their rows precede those of p in sequence b), ``joined`` that of all parts.

The numbers of rows and of sequences change from batch to batch: Triton doesn't specialise on them (it would compile
again for 1 and for multiples of 16), but on the width it does, for wide loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.jagged.triton_rows import copy_rows, find_rows


@triton.jit(do_not_specialize=["rows", "sequences"])
def concat_part(
    part_ptr, out_ptr, part_offsets_ptr, before_ptr, joined_ptr, rows, sequences, width,
    FIRST: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the joined rows that come from this part; of the first part, also zeros to the rows of no sequence."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sequence, place, _, inside = find_rows(joined_ptr, sequences, row, STEPS)
    begin = tl.load(part_offsets_ptr + sequence, mask=inside, other=0)
    end = tl.load(part_offsets_ptr + sequence + 1, mask=inside, other=0)
    if not FIRST:
        place -= tl.load(before_ptr + sequence + 1, mask=inside, other=0)
        place += tl.load(before_ptr + sequence, mask=inside, other=0)
    taken = inside & (place >= 0) & (place < end - begin)
    written = taken
    if FIRST:
        written = taken | ((inside == 0) & (row < rows))
    copy_rows(part_ptr, begin + place, out_ptr, row, taken, written, tl.zeros([], tl.int32), width, BLOCK_C)


@triton.jit(do_not_specialize=["rows", "sequences"])
def split_part(
    joined_rows_ptr, part_ptr, part_offsets_ptr, before_ptr, joined_ptr, rows, sequences, width,
    FIRST: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes all rows of this part, zeros to those of no sequence."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sequence, place, _, inside = find_rows(part_offsets_ptr, sequences, row, STEPS)
    source = tl.load(joined_ptr + sequence, mask=inside, other=0) + place
    if not FIRST:
        source += tl.load(before_ptr + sequence + 1, mask=inside, other=0)
        source -= tl.load(before_ptr + sequence, mask=inside, other=0)
    copy_rows(
        joined_rows_ptr, source, part_ptr, row, inside, row < rows, tl.zeros([], tl.int32), width, BLOCK_C
    )  # fmt: skip
