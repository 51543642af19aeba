"""The Triton kernel as launches would make it, to be compiled without a GPU."""

from __future__ import annotations

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.counter_random import triton_kernel
from gr_kernels.counter_random.triton_op import BLOCKS, WARPS

_TYPES = {
    "ordinals_ptr": "*i64",
    "positions_ptr": "*i64",
    "key_low": "u32",
    "key_high": "u32",
    "high": "u64",
    "rows": "i32",
    "draws": "i32",
}


def _case(dtype: str, draws: str) -> CompileCase:
    """draws: "any", "x16" (a multiple of 16) or "one"; float64 is of table rows, which have no positions."""
    constexprs: dict[str, int | None] = {"BLOCKS": BLOCKS}
    if draws == "one":
        constexprs["draws"] = 1
    if dtype == "fp64":
        constexprs["positions_ptr"] = None
    types = {"out_ptr": f"*{dtype}", **_TYPES}
    return CompileCase(
        name=f"draw.{dtype}.{draws}",
        kernel=triton_kernel.draw,
        signature={name: kind for name, kind in types.items() if name not in constexprs},
        constexprs=constexprs,
        num_warps=WARPS,
        num_stages=3,
        hot=False,
        divisible_by_16=("draws",) if draws == "x16" else (),
    )


CASES = [
    _case("i32", "any"),
    _case("i32", "x16"),
    _case("i64", "any"),
    _case("i64", "x16"),
    _case("fp32", "one"),
    _case("fp32", "any"),
    _case("fp64", "x16"),
]
