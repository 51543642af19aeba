"""Loads from small tables that the L1 cache holds.

Triton's pipeliner prefetches every tl.load of a loop whose value reaches a product into shared memory, a whole tile
for each stage. For a table that is a waste of shared memory (a 128 x 64 tile of biases in three stages takes 96 KB),
so on a GPU these loads are inline assembly, which it leaves alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(pointers, ASSEMBLY: tl.constexpr):
    """float32 of the table entries (float32, bfloat16 or float16) at a tensor of pointers."""
    if not ASSEMBLY:
        values = tl.load(pointers)
    elif pointers.dtype.element_ty == tl.float32:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.b16 $0, [$1];",
            "=h,l",
            [pointers],
            dtype=pointers.dtype.element_ty,
            is_pure=True,
            pack=1,
        )
    return values.to(tl.float32)


@triton.jit
def gather_some(pointers, mask, ASSEMBLY: tl.constexpr):
    """int64 entries where `mask`, 0 elsewhere, where nothing is loaded."""
    if ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b64 $0, 0; @p ld.global.nc.b64 $0, [$1]; }",
            "=&l,l,r",
            [pointers, mask.to(tl.int32)],
            dtype=tl.int64,
            is_pure=True,
            pack=1,
        )
    else:
        values = tl.load(pointers, mask=mask, other=0)
    return values
