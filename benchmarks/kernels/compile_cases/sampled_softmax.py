"""What to compile without a GPU: the kernels of each query's own negatives (shared ones are log_partition's).

They have no matrix products to run as wgmma: gathers and float32 sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.sampled_softmax import triton_kernel
from gr_kernels.sampled_softmax.tiles import tiles

_TYPES = {
    "bias": "*fp32",
    "targets": "*i64",
    "negatives": "*i32",
    "losses": "*fp32",
    "peaks": "*fp32",
    "sums": "*fp32",
    "directions": "*fp32",
    "pairs": "*i64",
    "starts": "*i64",
    "upstream": "*fp32",
    "grad_bias": "*fp32",
    "K": "i32",
    "C": "i32",
    "scale2": "fp32",
    "scale": "fp32",
    "eps": "fp32",
}


_OPTIONAL = ("bias", "directions", "grad_bias")


def _cases() -> Iterator[CompileCase]:
    for kind, width, full in (
        ("bf16", 64, True),
        ("bf16", 64, False),
        ("bf16", 256, True),
        ("fp32", 50, True),
        ("fp32", 256, True),
    ):
        use = tiles(width)
        for kernel, rows in (
            (triton_kernel.own_negatives, "BLOCK_K"),
            (triton_kernel.row_gradient, "BLOCK_P"),
        ):
            constexprs: dict[str, Any] = {
                "D": width,
                "BLOCK_D": use.width,
                rows: use.rows,
                "NORMALIZE": full,
            }
            if not full:
                constexprs.update({name: None for name in _OPTIONAL if name in kernel.arg_names})
            matrices = dict.fromkeys(("queries", "table", "grad_table"), f"*{kind}")
            types = {**matrices, **_TYPES, **dict.fromkeys(constexprs, "constexpr")}
            yield CompileCase(
                name=f"{kernel.__name__}.{kind}.d{width}.{'full' if full else 'plain'}",
                kernel=kernel,
                signature={name: types[name] for name in kernel.arg_names},
                constexprs=constexprs,
                num_warps=use.num_warps,
                num_stages=3,
                hot=False,
                spill_budget=0 if width % 16 == 0 else 32,
            )


CASES = list(_cases())
