"""Jagged concatenation and split in Triton, as differentiable torch operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gr_kernels.jagged.concat_split.cpp import register_gradients
from gr_kernels.jagged.concat_split.reference import joined_offsets
from gr_kernels.jagged.tiles import INTEGERS, WARPS, search_steps, tile
from gr_kernels.operators import define
from gr_kernels.tracing import once
from gr_kernels.triton_common.available import on, why_unavailable


def obstacle(tensor: Tensor, parts: int) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if tensor.dtype.itemsize not in INTEGERS:
        return f"it moves numbers of 1, 2, 4 or 8 bytes, not {tensor.dtype}"
    return why_unavailable(tensor.device)


def concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    return torch.ops.gr_kernels.jagged_concat_triton(list(parts), list(offsets))  # type: ignore[no-any-return]


def split(joined: Tensor, offsets: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return torch.ops.gr_kernels.jagged_split_triton(joined, list(offsets), list(rows))  # type: ignore[no-any-return]


def as_integers(x: Tensor) -> Tensor:
    """The same memory, contiguous, as integers of the size of its numbers: (rows, width)."""
    integers = x.contiguous().view(INTEGERS[x.dtype.itemsize])
    return integers.view(x.shape[0], math.prod(x.shape[1:]))


def _move_parts(kernel_name: str, joined: Tensor, parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> None:
    """Runs one of the two kernels for every part."""
    from gr_kernels.jagged.concat_split import triton_kernel

    kernel = getattr(triton_kernel, kernel_name)
    joined_rows = as_integers(joined)
    before, edges = offsets[0], joined_offsets(offsets)
    sequences = edges.shape[0] - 1
    for number, (part, offsets_B1) in enumerate(zip(parts, offsets)):
        part_rows = as_integers(part)
        source, out = (part_rows, joined_rows) if kernel_name == "concat_part" else (joined_rows, part_rows)
        first = number == 0
        if out.numel():
            width = out.shape[1]
            t = tile(width, out.itemsize)
            with on(out):
                kernel[(-(-out.shape[0] // t.rows),)](
                    source, out, offsets_B1, before, edges, out.shape[0], sequences, width,
                    FIRST=first, STEPS=search_steps(sequences + 1), BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
                )  # fmt: skip
        if not first:
            before = before + offsets_B1


def _concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    out = _concat_fake(parts, offsets)
    _move_parts("concat_part", out, parts, [edges.contiguous() for edges in offsets])
    return out


def _concat_fake(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


def _split(joined: Tensor, offsets: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    parts = _split_fake(joined, offsets, rows)
    _move_parts("split_part", joined, parts, [edges.contiguous() for edges in offsets])
    return parts


def _split_fake(joined: Tensor, offsets: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [joined.new_empty((count, *joined.shape[1:])) for count in rows]


@once
def register() -> None:
    concat_schema = "(Tensor[] parts, Tensor[] offsets) -> Tensor"
    split_schema = "(Tensor joined, Tensor[] offsets, SymInt[] rows) -> Tensor[]"
    define("jagged_concat_triton", concat_schema, _concat, _concat_fake)
    define("jagged_split_triton", split_schema, _split, _split_fake)
    register_gradients("jagged_concat_triton", "jagged_split_triton")
