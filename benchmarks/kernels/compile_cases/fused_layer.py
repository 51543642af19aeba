"""The kernels as training launches them: bfloat16 at the widths of small and large models, and float32."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.fused_layer import triton_kernel
from gr_kernels.fused_layer.tiles import linear_tiles, row_tiles

_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_ROWS = {"rows": "i32", "stride_x": "i32"}
_STATISTICS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
_DROPOUT = {"key_low": "i32", "key_high": "i32", "drop_last": "i32", "keep_scale": "fp32"}


def _linear(
    name: str,
    inputs: int,
    outputs: int,
    epilogue: str,
    normalise: bool,
    x: str = "*bf16",
    weight: str = "*bf16",
    other: str = "",
    parts: int = 1,
) -> CompileCase:
    dtype = next(dtype for dtype, type_ in _TYPES.items() if type_ == weight)
    tiles = linear_tiles(dtype, inputs, outputs, epilogue)
    other = other or weight
    others = ("other_ptr", "other_1_ptr", "other_2_ptr", "other_3_ptr")[:parts]
    strides = ("stride_other", "stride_1", "stride_2", "stride_3")
    signature = {
        "x_ptr": x,
        "weight_ptr": weight,
        "out_ptr": other,
        **_ROWS,
        **(_STATISTICS if normalise else {}),
        **({} if epilogue == "silu" else dict.fromkeys(others, other)),
        **dict.fromkeys(strides, "i32"),
    }
    absent = [n for n in triton_kernel.linear.arg_names if n.endswith("_ptr") and n not in signature]
    ends = [min(i, parts) * outputs // parts for i in (1, 2, 3)]
    return CompileCase(
        name=f"linear.{name}",
        kernel=triton_kernel.linear,
        signature=signature,
        constexprs={
            **dict.fromkeys(absent),
            "K": inputs,
            "N": outputs,
            "END_0": ends[0],
            "END_1": ends[1],
            "END_2": ends[2],
            "NORMALISE": normalise,
            "EPILOGUE": epilogue,
            "FAST": weight == "*bf16",
            "PRECISION": "ieee",
            **tiles.constexprs,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        hot=weight == "*bf16",
        divisible_by_16=("stride_x", *strides),
    )


def _row(name: str, kernel: Any, width: int, pointers: dict[str, str], **settings: Any) -> CompileCase:
    """A row kernel without the norm's parameters; every pointer that isn't given is None."""
    tiles = row_tiles(width)
    numbers = {"rows": "i32", "eps": "fp32", **_DROPOUT}
    numbers |= dict.fromkeys(("stride_x", "stride_attended", "stride_gate"), "i32")
    signature = {**pointers, **{n: t for n, t in numbers.items() if n in kernel.arg_names}}
    absent = [n for n in kernel.arg_names if n.endswith("_ptr") and n not in pointers]
    return CompileCase(
        name=f"{name}.{width}",
        kernel=kernel,
        signature=signature,
        constexprs={**dict.fromkeys(absent), "WIDTH": width, **tiles.constexprs, **settings},
        num_warps=tiles.warps,
        num_stages=3,
        hot=False,
        divisible_by_16=tuple(n for n in signature if n.startswith("stride_")),
    )


def _bf16(*names: str) -> dict[str, str]:
    return {**{f"{name}_ptr": "*bf16" for name in names}, **_STATISTICS}


CASES = [
    _linear("silu.bf16.512", 512, 2048, "silu", False),
    _linear("silu.bf16.256", 256, 1024, "silu", False),
    _linear("silu.bf16.50", 50, 200, "silu", False),
    _linear("norm_silu.bf16.512", 512, 2048, "silu", True),
    _linear("norm_silu.bf16_of_fp32.512", 512, 2048, "silu", True, x="*fp32"),
    _linear("slope.bf16.512", 512, 2048, "slope", False, parts=4),
    _linear("residual.bf16.512", 512, 512, "residual", False),
    _linear("residual.bf16_to_fp32.512", 512, 512, "residual", False, other="*fp32"),
    _linear("norm_silu.fp32.256", 256, 1024, "silu", True, x="*fp32", weight="*fp32"),
    _row("measure.bf16", triton_kernel.normalise, 512, _bf16("x", "normed"), MEASURE=True),
    _row("normalise.bf16", triton_kernel.normalise, 512, _bf16("x", "normed"), MEASURE=False),
    _row(
        "normalise_backward.bf16",
        triton_kernel.normalise_backward,
        512,
        _bf16("d_normed", "x", "d_x"),
        STANDARD=True,
    ),
    *(
        _row("gate.bf16", triton_kernel.gate, width, _bf16("attended", "gate", "gated"), DROPOUT=True)
        for width in (512, 4096)
    ),
    *(
        _row(
            "gate_backward.bf16",
            triton_kernel.gate_backward,
            width,
            _bf16("d_gated", "attended", "gate", "d_attended", "d_gate", "gated"),
            DROPOUT=True,
        )
        for width in (512, 4096)
    ),
]
