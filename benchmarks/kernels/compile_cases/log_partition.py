"""What to compile without a GPU: the kernels at each width, in the forms that training runs and the fullest ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.log_partition import triton_kernel
from gr_kernels.log_partition.tiles import tiles

_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
_INTEGERS = {"T": "i32", "I": "i32", "tiles_per_split": "i32"}
_FLOATS = {"scale2": "fp32", "scale": "fp32"}
_POINTERS = {
    "inverse": "*fp32",
    "bias": "*fp32",
    "names": "*i32",
    "excluded": "*i32",
    "targets": "*i32",
    "peaks": "*fp32",
    "sums": "*fp32",
    "means": "*fp32",
    "factors": "*fp32",
    "upstream": "*fp32",
    "grad_bias": "*fp32",
}
# Bytes that may spill, by kind, width and compute capability. Products of float32 are three of tf32 each, whose pieces
# take registers beside the accumulators; 8.0 holds more operands in registers than 9.0.
_SPILLS = {
    ("bf16", 128, 80): 64,
    ("fp32", 50, 80): 512,
    ("fp32", 128, 80): 4096,
    ("fp32", 128, 90): 640,
    ("fp32", 256, 80): 512,
    ("fp32", 256, 90): 512,
}
# optional arguments that a form leaves out
_FORMS: dict[str, tuple[str, ...]] = {
    "plain": ("inverse", "bias", "names", "excluded", "grad_bias"),
    "full": (),
    "sums": ("inverse", "bias", "names", "targets", "means", "grad_table"),
}


def _cases() -> Iterator[CompileCase]:
    for kind, width, form in (
        ("bf16", 64, "plain"),
        ("bf16", 64, "full"),
        ("bf16", 64, "sums"),
        ("bf16", 128, "plain"),
        ("bf16", 128, "full"),
        ("bf16", 256, "plain"),
        ("bf16", 256, "full"),
        ("bf16", 50, "full"),
        ("fp16", 64, "plain"),
        ("fp32", 50, "plain"),
        ("fp32", 128, "full"),
        ("fp32", 256, "full"),
    ):
        for kernel in ("partial_sums", "table_gradient"):
            for architecture in (80, 90):
                yield _case(kernel, kind, width, form, architecture)


def _case(kernel: str, kind: str, width: int, form: str, architecture: int) -> CompileCase:
    function: Any = getattr(triton_kernel, kernel)
    forward = kernel == "partial_sums"
    chosen = tiles(width, _BITS[kind], architecture // 10, gradient=not forward)
    constexprs: dict[str, Any] = {
        "D": width,
        "X": 0 if "excluded" in _FORMS[form] else 1,
        "BLOCK_D": chosen.width,
        "BLOCK_T": chosen.held if forward else chosen.streamed,
        "BLOCK_I": chosen.streamed if forward else chosen.held,
        "PRECISION": "tf32x3" if kind == "fp32" else "ieee",
    }
    constexprs.update({name: None for name in _FORMS[form] if name in function.arg_names})
    matrices = dict.fromkeys(("queries", "table", "grad_table"), f"*{kind}")
    types = {**matrices, **_POINTERS, **_INTEGERS, **_FLOATS, **dict.fromkeys(constexprs, "constexpr")}
    return CompileCase(
        name=f"{kernel}.{kind}.d{width}.{form}",
        kernel=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs=constexprs,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        hot=kind != "fp32" and width % 16 == 0,
        spill_budget=_SPILLS.get((kind, width, architecture), 0),
        architectures=(architecture,),
    )


CASES = list(_cases())
