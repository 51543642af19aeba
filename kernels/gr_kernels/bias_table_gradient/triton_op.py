"""The table gradient in Triton, as a torch operator: values sorted by bucket, and the sum of each bucket's.

M values. The values are rows of one number to `sum_rows_by_entry`, which embedding tables' gradients are made with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.operators import define
from gr_kernels.tracing import once
from gr_kernels.triton_common.available import why_unavailable, wrong_dtype
from gr_kernels.triton_common.sums_by_entry import sum_rows_by_entry

# Values sorted at once: they keep a large GPU busy, and take about 30 bytes each for as long.
PIECE = 1 << 24
_MOST_ENTRIES = 2**31


def obstacle(values: Tensor, entries: int) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if reason := wrong_dtype(values.dtype):
        return reason
    if entries >= _MOST_ENTRIES:
        return f"it counts entries in 31 bits, and there are {entries:,}"
    return why_unavailable(values.device)


def table_gradient(values: Tensor, buckets: Tensor, entries: int, deterministic: bool) -> Tensor:
    """(entries,) float32, the same bits every time, asked for or not."""
    return torch.ops.gr_kernels.bias_table_gradient_triton(  # type: ignore[no-any-return]
        values, buckets, entries
    )


def _run(values: Tensor, buckets: Tensor, entries: int) -> Tensor:
    sums = values.new_zeros(entries, dtype=torch.float32)
    for value_M, bucket_M in zip(
        values.reshape(-1).split(PIECE), buckets.reshape(-1).split(PIECE), strict=True
    ):
        inside_M = (bucket_M >= 0) & (bucket_M < entries)
        sums += sum_rows_by_entry(value_M[:, None], bucket_M, inside_M, entries)[:, 0]
    return sums


def _fake(values: Tensor, buckets: Tensor, entries: int) -> Tensor:
    return values.new_empty(entries, dtype=torch.float32)


@once
def register() -> None:
    schema = "(Tensor values, Tensor buckets, SymInt entries) -> Tensor"
    define("bias_table_gradient_triton", schema, _run, _fake)
