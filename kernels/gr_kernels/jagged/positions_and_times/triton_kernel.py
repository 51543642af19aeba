"""Triton kernel: x scale + position[entry] + time[bucket]."""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.hstu_attention.buckets import LONGEST as _LONGEST
from gr_kernels.jagged.triton_rows import find_rows, upper_bound

LONGEST = tl.constexpr(_LONGEST)


@triton.jit(do_not_specialize=["rows", "sequences"])  # they change from batch to batch
def add_rows(
    x_ptr, out_ptr, offsets_ptr, targets_ptr, position_ptr, time_ptr, differences_ptr, thresholds_ptr,
    scale, rows, sequences, thresholds, width, x_stride,
    HAS_TARGETS: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, FROM_BACK: tl.constexpr,
    STEPS: tl.constexpr, BUCKET_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of rows a program; sums in float32, rounded once. Rows of no sequence become zero."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sequence, place, history, inside = find_rows(offsets_ptr, sequences, row, STEPS)
    entry = place
    if HAS_POSITION:
        if HAS_TARGETS:
            history -= tl.load(targets_ptr + sequence, mask=inside, other=0)
        if FROM_BACK:
            entry = tl.maximum(history - place, 0)
        else:
            entry = tl.minimum(place, history)
    bucket = place
    if HAS_TIME:
        difference = tl.load(differences_ptr + row, mask=inside, other=0)
        size = tl.minimum(tl.abs(tl.maximum(difference, -LONGEST)), LONGEST)
        bucket = upper_bound(thresholds_ptr, thresholds, size, BUCKET_STEPS)
    for first in range(0, width, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        here = (column < width)[None, :]
        read = inside[:, None] & here
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=read, other=0.0)
        total = x.to(tl.float32) * scale
        if HAS_POSITION:
            at = position_ptr + entry[:, None] * width + column[None, :]
            total += tl.load(at, mask=read, other=0.0).to(tl.float32)
        if HAS_TIME:
            at = time_ptr + bucket[:, None] * width + column[None, :]
            total += tl.load(at, mask=read, other=0.0).to(tl.float32)
        out_at = out_ptr + row[:, None] * width + column[None, :]
        tl.store(out_at, total.to(x.dtype), mask=(row < rows)[:, None] & here)
