"""Gradients of embedding tables: the rows of a tensor summed by the entry of the table that each used.

T rows, D width, E entries of the table. No atomic additions: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.jagged.tiles import WARPS
from gr_kernels.triton_common.available import on
from gr_kernels.triton_common.sizes import power_of_two

BLOCK_ROWS = 32
COLUMNS = 128
PROGRAMS = 2048  # about eight on each multiprocessor of a large GPU
PART_ROWS = 64  # not worth splitting further


def parts(rows: int, entries: int, width: int) -> int:
    """Into how many parts the sum of an entry is cut, so that a few much-used entries don't keep one program busy."""
    programs = entries * -(-width // COLUMNS)
    most = min(PROGRAMS // max(programs, 1), rows // PART_ROWS)
    return max(1, power_of_two(most + 1) // 2)  # the power of two at or below


def sum_rows_by_entry(values_TD: Tensor, entry_T: Tensor, inside_T: Tensor, entries: int) -> Tensor:
    """(E, D) float32; rows that aren't ``inside`` count nowhere. No number is read on the host."""
    from gr_kernels.jagged.positions_and_times import triton_kernel

    rows, width = values_TD.shape
    narrow = (
        torch.int16 if entries < 2**15 else torch.int32
    )  # half or a quarter of int64's passes of the sort
    key_T = torch.where(inside_T, entry_T, -1).to(narrow)
    sorted_T, order_T = torch.sort(key_T, stable=True)
    edges = torch.arange(entries + 1, device=values_TD.device, dtype=torch.int32)
    starts = torch.searchsorted(sorted_T.to(torch.int32), edges)
    split = parts(rows, entries, width)
    sums = values_TD.new_empty((split, entries, width), dtype=torch.float32)
    if sums.numel():
        columns = min(power_of_two(width), COLUMNS)
        with on(values_TD):
            triton_kernel.sum_rows_by_entry[(entries, split, -(-width // columns))](
                values_TD, order_T, starts, sums, entries, width,
                SPLITS=split, BLOCK_R=BLOCK_ROWS, BLOCK_C=columns, num_warps=WARPS,
            )  # fmt: skip
    return sums[0] if split == 1 else sums.sum(0)
