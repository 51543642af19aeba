"""The Triton kernels of this folder as launches would make them, to be compiled without a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.jagged.concat_split import triton_kernel as concat_split
from gr_kernels.jagged.dense import triton_kernel as dense
from gr_kernels.jagged.dropout import triton_kernel as dropout
from gr_kernels.jagged.positions_and_times import triton_kernel as positions_and_times
from gr_kernels.jagged.tiles import WARPS, add_tile, dropout_tile, search_steps, tile
from gr_kernels.triton_common import sums_by_entry, sums_by_entry_kernel

SEQUENCES = 128
BUCKETS = 129


def _case(
    name: str, kernel: Any, types: str, constexprs: dict[str, Any], divisible: tuple[str, ...] = ("width",)
) -> CompileCase:
    """``types``: those of the arguments that aren't constexprs, in order."""
    names = [argument for argument in kernel.arg_names if argument not in constexprs]
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=dict(zip(names, types.split(), strict=True)),
        constexprs=constexprs,
        num_warps=WARPS,
        num_stages=3,
        hot=False,
        divisible_by_16=divisible,
    )


def _moves(integer: str, item_bytes: int, width: int) -> list[CompileCase]:
    t = tile(width, item_bytes)
    block = {"BLOCK_R": t.rows, "BLOCK_C": t.columns}
    steps = {"STEPS": search_steps(SEQUENCES + 1)}
    rows = f"*{integer} *{integer}"
    name = f"{integer}.d{width}"
    parts = [
        _case(
            f"{kernel.__name__}.{'first' if first else 'next'}.{name}",
            kernel,
            f"{rows} *i64 *i64 *i64 i32 i32 i32",
            {"FIRST": first, **steps, **block},
        )
        for kernel in (concat_split.concat_part, concat_split.split_part)
        for first in (True, False)
    ]
    return [
        *parts,
        _case(f"to_dense.{name}", dense.to_dense, f"{rows} *i64 i64 i32 i32 i32", block),
        _case(f"to_jagged.{name}", dense.to_jagged, f"{rows} *i64 i32 i32 i32 i32", steps | block),
    ]


def _additions(dtype: str, width: int) -> list[CompileCase]:
    t = add_tile(width, 4 if dtype == "fp32" else 2)
    settings = {
        "HAS_TARGETS": True, "HAS_POSITION": True, "HAS_TIME": True, "FROM_BACK": False,
        "STEPS": search_steps(SEQUENCES + 1), "BUCKET_STEPS": search_steps(BUCKETS - 1),
        "BLOCK_R": t.rows, "BLOCK_C": t.columns,
    }  # fmt: skip
    tile_rows, columns = sums_by_entry.block(width)
    split = sums_by_entry.parts(1 << 17, BUCKETS, width)
    blocks = {"SPLITS": split, "BLOCK_R": tile_rows, "BLOCK_C": columns}
    return [
        _case(
            f"add_rows.{dtype}.d{width}", positions_and_times.add_rows,
            f"*{dtype} *{dtype} *i64 *i64 *fp32 *fp32 *i64 *i64 fp32 i32 i32 i32 i32 i32", settings,
            ("width", "x_stride"),
        ),
        _case(
            f"sum_rows_by_entry.{dtype}.d{width}", sums_by_entry_kernel.sum_rows_by_entry,
            f"*{dtype} *i64 *i64 *fp32 i32 i32", blocks,
        ),
    ]  # fmt: skip


def _drops(dtype: str, width: int) -> CompileCase:
    t = dropout_tile(width)
    return _case(
        f"drop.{dtype}.d{width}",
        dropout.drop,
        f"*{dtype} *{dtype} u32 u32 u32 fp32 i32 i32",
        {"numbers_ptr": None, "BLOCK_R": t.rows, "BLOCK_C": t.columns},
    )


CASES = [
    *_moves("i16", 2, 64),
    *_moves("i16", 2, 512),
    *_moves("i32", 4, 256),
    *_additions("bf16", 64),
    *_additions("bf16", 512),
    *_additions("fp32", 64),
    *_additions("fp32", 256),
    _drops("bf16", 64),
    _drops("bf16", 512),
    _drops("fp32", 256),
]
