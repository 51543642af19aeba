"""Launches the kernels of both operators and of their gradients.

The large GEMMs of the backward pass (of the weights, of the rows) are torch.matmul's; what stands around them is
fused.  Shapes: T rows, D width of the norm's input, E outputs of the linear layer, V width of the gate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gr_kernels.fused_layer.schema import Functions, keeps_normed, keeps_x
from gr_kernels.fused_layer.tiles import MOST_PARTS, WIDEST, linear_tiles, row_tiles
from gr_kernels.operators import unsigned
from gr_kernels.triton_common.available import interpreting, on, why_unavailable, wrong_dtype

MOST_OTHERS = 4  # parts of a second tensor that the GEMM's epilogue reads


def obstacle(*tensors: Tensor | None) -> str:
    """Why Triton can't take a call with these tensors, the first of which is normalised; "" when it can."""
    first = tensors[0]
    assert first is not None
    if why := why_unavailable(first.device):
        return why
    if first.shape[1] > WIDEST:
        return f"a row of {first.shape[1]:,} is wider than {WIDEST:,}"
    for tensor in tensors:
        if tensor is not None and (why := wrong_dtype(tensor.dtype)):
            return why
    return ""


def _rows(x: Tensor) -> Tensor:
    """Rows may have any stride; neighbouring numbers must be neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _int32(word: int) -> int:
    """The int32 with the bits of a 32-bit word: an argument whose type doesn't depend on its value."""
    return word - 2**32 if word >= 2**31 else word


def _dropout_arguments(dropout: float, dropout_key: int) -> dict[str, Any]:
    key = unsigned(dropout_key)
    return {
        "key_low": _int32(key & 0xFFFFFFFF),
        "key_high": _int32(key >> 32),
        "drop_last": _int32(max(math.ceil(dropout * 2**32) - 1, 0)),
        "keep_scale": 1.0 / (1.0 - dropout),
        "DROPOUT": dropout > 0.0,
    }


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _normalise(
    x_TD: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    normed_TD: Tensor | None,
    *,
    eps: float = 0.0,
    measure: bool,
) -> None:
    from gr_kernels.fused_layer import triton_kernel

    if x_TD.shape[0] == 0:
        return
    tiles = row_tiles(x_TD.shape[1])
    triton_kernel.normalise[(math.ceil(x_TD.shape[0] / tiles.rows),)](
        x_TD, norm_weight, norm_bias, mean_T, rstd_T, normed_TD, x_TD.shape[0], x_TD.stride(0), eps,
        WIDTH=x_TD.shape[1], MEASURE=measure, num_warps=tiles.warps, **tiles.constexprs,
    )  # fmt: skip


def _linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias: Tensor | None,
    epilogue: str,
    out_TN: Tensor,
    *,
    others: Sequence[Tensor] = (),
    linear_TN: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """The GEMM with an epilogue (see the kernel).

    others: the parts, side by side, of what the epilogue combines with the product.  norm: mean, rstd, scale and
    shift of x, to normalise it on its way in.
    """
    from gr_kernels.fused_layer import triton_kernel

    rows, (outputs, inputs) = x_TK.shape[0], weight_NK.shape
    if rows == 0:
        return out_TN
    mean, rstd, norm_weight, norm_bias = norm or (None, None, None, None)
    tiles = linear_tiles(weight_NK.dtype, inputs, outputs, epilogue)
    if len(others) > MOST_OTHERS or any(other.shape[1] % tiles.n for other in others[:-1]):
        others = [torch.cat(list(others), dim=1)]  # a tile of columns would read two parts
    parts: list[Tensor | None] = [_rows(other) for other in others]
    parts += [None] * (MOST_OTHERS - len(parts))
    ends = list(itertools.accumulate(0 if part is None else part.shape[1] for part in parts))[:-1]
    tf32 = torch.backends.cuda.matmul.allow_tf32 and weight_NK.dtype == torch.float32
    triton_kernel.linear[(math.ceil(rows / tiles.m) * math.ceil(outputs / tiles.n),)](
        x_TK, weight_NK, bias, mean, rstd, norm_weight, norm_bias, *parts, linear_TN, out_TN,
        rows, x_TK.stride(0), *(0 if part is None else part.stride(0) for part in parts),
        K=inputs, N=outputs, END_0=ends[0], END_1=ends[1], END_2=ends[2], NORMALISE=norm is not None, EPILOGUE=epilogue,
        FAST=weight_NK.dtype == torch.bfloat16 and not interpreting(), PRECISION="tf32" if tf32 else "ieee",
        num_warps=tiles.warps, num_stages=tiles.stages, **tiles.constexprs,
    )  # fmt: skip
    return out_TN


def _parts(rows: int, rows_of_tile: int, table: Tensor | None, *others: Tensor | None) -> int:
    """How many programs share the rows: as many as there are tiles, or fewer where each leaves a partial sum."""
    tiles = math.ceil(rows / rows_of_tile)
    return tiles if all(t is None for t in (table, *others)) else min(tiles, MOST_PARTS)


def _partial(table: Tensor | None, parts: int) -> Tensor | None:
    return None if table is None else table.new_empty(parts, table.shape[0], dtype=torch.float32)


def _total(partial: Tensor | None, table: Tensor | None) -> Tensor | None:
    return None if partial is None or table is None else partial.sum(0).to(table.dtype)


def norm_linear_silu(
    x_TD: Tensor,
    weight_ED: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    recompute: bool,
) -> tuple[Tensor, ...]:
    x_TD, weight_ED = _rows(x_TD), weight_ED.contiguous()
    mean_T, rstd_T = _statistics(x_TD)
    out_TE = weight_ED.new_empty(x_TD.shape[0], weight_ED.shape[0])
    with on(x_TD):
        if not keeps_normed(norm_weight, norm_bias, recompute):
            _normalise(x_TD, norm_weight, norm_bias, mean_T, rstd_T, None, eps=eps, measure=True)
            norm = (mean_T, rstd_T, norm_weight, norm_bias)
            _linear(x_TD, weight_ED, bias, "silu", out_TE, norm=norm)
            return out_TE, mean_T, rstd_T, weight_ED.new_empty(0), weight_ED.new_empty(0)
        normed_TD = weight_ED.new_empty(x_TD.shape)
        linear_TE = None if recompute else torch.empty_like(out_TE)
        _normalise(x_TD, norm_weight, norm_bias, mean_T, rstd_T, normed_TD, eps=eps, measure=True)
        _linear(normed_TD, weight_ED, bias, "silu", out_TE, linear_TN=linear_TE)
    return out_TE, mean_T, rstd_T, normed_TD, weight_ED.new_empty(0) if linear_TE is None else linear_TE


def norm_linear_silu_backward(
    d_parts: Sequence[Tensor],
    x_TD: Tensor,
    weight_ED: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    normed_TD: Tensor,
    linear_TE: Tensor,
    recompute: bool,
) -> tuple[Tensor | None, ...]:
    from gr_kernels.fused_layer import triton_kernel

    weight_ED, rows = weight_ED.contiguous(), mean_T.shape[0]
    with on(weight_ED):
        if not keeps_normed(norm_weight, norm_bias, recompute):
            x_TD = _rows(x_TD)
            normed_TD = weight_ED.new_empty(x_TD.shape)
            _normalise(x_TD, norm_weight, norm_bias, mean_T, rstd_T, normed_TD, measure=False)
        if recompute:
            d_linear_TE = weight_ED.new_empty(rows, weight_ED.shape[0])
            _linear(normed_TD, weight_ED, bias, "slope", d_linear_TE, others=d_parts)
        else:
            d_linear_TE = torch.empty_like(linear_TE)
            widths = [part.shape[1] for part in d_parts]
            columns = zip(d_parts, linear_TE.split(widths, dim=1), d_linear_TE.split(widths, dim=1))
            for d_part, linear, d_linear in columns:
                torch.ops.aten.silu_backward.grad_input(d_part, linear, grad_input=d_linear)
        d_weight = d_linear_TE.T @ normed_TD
        d_bias = None if bias is None else d_linear_TE.sum(0)
        d_normed_TD = d_linear_TE @ weight_ED
        d_x_TD = x_TD.new_empty(normed_TD.shape)
        standard = not keeps_x(norm_weight, norm_bias, recompute)
        source_TD = normed_TD if standard else _rows(x_TD)
        width = normed_TD.shape[1]
        tiles = row_tiles(width)
        parts = _parts(rows, tiles.rows, norm_weight, norm_bias)
        d_norm_weight, d_norm_bias = _partial(norm_weight, parts), _partial(norm_bias, parts)
        if rows:
            triton_kernel.normalise_backward[(parts,)](
                d_normed_TD, source_TD, mean_T, rstd_T, norm_weight, d_x_TD, d_norm_weight, d_norm_bias, rows,
                source_TD.stride(0), WIDTH=width, STANDARD=standard, num_warps=tiles.warps, **tiles.constexprs,
            )  # fmt: skip
    return d_x_TD, d_weight, _total(d_norm_weight, norm_weight), _total(d_norm_bias, norm_bias), d_bias


def gated_output(
    attended_TV: Tensor,
    gate_TV: Tensor,
    residual_TD: Tensor,
    weight_DV: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dropout: float,
    dropout_key: int,
    recompute: bool,
) -> tuple[Tensor, ...]:
    from gr_kernels.fused_layer import triton_kernel

    attended_TV, gate_TV, residual_TD = _rows(attended_TV), _rows(gate_TV), _rows(residual_TD)
    weight_DV = weight_DV.contiguous()
    rows, width = attended_TV.shape
    mean_T, rstd_T = _statistics(attended_TV)
    gated_TV = weight_DV.new_empty(rows, width)
    tiles = row_tiles(width)
    with on(attended_TV):
        if rows:
            triton_kernel.gate[(math.ceil(rows / tiles.rows),)](
                attended_TV, gate_TV, norm_weight, norm_bias, mean_T, rstd_T, gated_TV, rows,
                attended_TV.stride(0), gate_TV.stride(0), eps, WIDTH=width, num_warps=tiles.warps,
                **tiles.constexprs, **_dropout_arguments(dropout, dropout_key),
            )  # fmt: skip
        out_TD = residual_TD.new_empty(residual_TD.shape)
        _linear(gated_TV, weight_DV, bias, "residual", out_TD, others=[residual_TD])
    return out_TD, mean_T, rstd_T, weight_DV.new_empty(0) if recompute else gated_TV


def gated_output_backward(
    d_out_TD: Tensor,
    attended_TV: Tensor,
    gate_TV: Tensor,
    weight_DV: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    gated_TV: Tensor,
    dropout: float,
    dropout_key: int,
    recompute: bool,
) -> tuple[Tensor | None, ...]:
    from gr_kernels.fused_layer import triton_kernel

    attended_TV, gate_TV = _rows(attended_TV), _rows(gate_TV)
    rows, width = attended_TV.shape
    with on(attended_TV):
        d_linear_TD = d_out_TD.to(weight_DV.dtype)
        d_gated_TV = d_linear_TD @ weight_DV
        d_attended, d_gate = attended_TV.new_empty(attended_TV.shape), gate_TV.new_empty(gate_TV.shape)
        if recompute:
            gated_TV = weight_DV.new_empty(attended_TV.shape)
        tiles = row_tiles(width)
        parts = _parts(rows, tiles.rows, norm_weight, norm_bias)
        d_norm_weight, d_norm_bias = _partial(norm_weight, parts), _partial(norm_bias, parts)
        if rows:
            triton_kernel.gate_backward[(parts,)](
                d_gated_TV, attended_TV, gate_TV, mean_T, rstd_T, norm_weight, norm_bias, d_attended, d_gate,
                gated_TV if recompute else None, d_norm_weight, d_norm_bias, rows,
                attended_TV.stride(0), gate_TV.stride(0), WIDTH=width, num_warps=tiles.warps,
                **tiles.constexprs, **_dropout_arguments(dropout, dropout_key),
            )  # fmt: skip
        d_weight = d_linear_TD.T @ gated_TV
        d_bias = None if bias is None else d_linear_TD.sum(0)
    return (
        *(d_attended, d_gate, d_weight, d_bias),
        *(_total(d_norm_weight, norm_weight), _total(d_norm_bias, norm_bias)),
    )


FUNCTIONS = Functions(
    "triton", norm_linear_silu, norm_linear_silu_backward, gated_output, gated_output_backward
)
