"""Gradients of tables: the rows of a tensor summed by the entry of the table that each used.

T rows, D width, E entries of the table. No atomic additions: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.triton_common.available import on
from gr_kernels.triton_common.sizes import power_of_two

COLUMNS = 128
LEAST_ROWS, NUMBERS = 32, 1024  # of a tile: narrow rows are taken more at a time
PROGRAMS = 2048  # about eight on each multiprocessor of a large GPU
WARPS = 4


def block(width: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(power_of_two(width), COLUMNS)
    return max(LEAST_ROWS, NUMBERS // columns), columns


def parts(rows: int, entries: int, width: int) -> int:
    """Into how many parts the sum of an entry is cut, so that a few much-used entries don't keep one program busy."""
    programs = entries * -(-width // COLUMNS)
    worth_it = rows // (2 * block(width)[0])
    most = min(PROGRAMS // max(programs, 1), worth_it)
    return max(1, power_of_two(most + 1) // 2)  # the power of two at or below


def sum_rows_by_entry(values_TD: Tensor, entry_T: Tensor, inside_T: Tensor, entries: int) -> Tensor:
    """(E, D) float32 from float32, float16 or bfloat16; rows that aren't ``inside`` count nowhere.

    Fewer than 2^31 rows: torch sorts no more. No number is read on the host.
    """
    from gr_kernels.triton_common import sums_by_entry_kernel

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
        tile_rows, columns = block(width)
        with on(values_TD):
            sums_by_entry_kernel.sum_rows_by_entry[(entries, split, -(-width // columns))](
                values_TD, order_T, starts, sums, entries, width,
                SPLITS=split, BLOCK_R=tile_rows, BLOCK_C=columns, num_warps=WARPS,
            )  # fmt: skip
    return sums[0] if split == 1 else sums.sum(0)
