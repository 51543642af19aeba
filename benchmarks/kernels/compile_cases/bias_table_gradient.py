"""The Triton kernel as launches for single values would make it, to be compiled without a GPU."""

from __future__ import annotations

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.bias_table_gradient.triton_op import PIECE
from gr_kernels.triton_common import sums_by_entry, sums_by_entry_kernel


def _case(dtype: str, entries: int) -> CompileCase:
    rows, columns = sums_by_entry.block(1)
    return CompileCase(
        name=f"sum_rows_by_entry.{dtype}.e{entries}",
        kernel=sums_by_entry_kernel.sum_rows_by_entry,
        signature={
            "values_ptr": f"*{dtype}",
            "order_ptr": "*i64",
            "starts_ptr": "*i64",
            "sums_ptr": "*fp32",
            "entries": "i32",
        },
        constexprs={
            "width": 1,
            "SPLITS": sums_by_entry.parts(PIECE, entries, 1),
            "BLOCK_R": rows,
            "BLOCK_C": columns,
        },
        num_warps=sums_by_entry.WARPS,
        num_stages=3,
        hot=False,
    )


# A time table's entries, and those of a position table too large to be cut into parts.
CASES = [_case(dtype, entries) for dtype in ("fp32", "bf16", "fp16") for entries in (129, 8192)]
