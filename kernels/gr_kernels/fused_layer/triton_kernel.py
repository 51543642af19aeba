"""The kernels of both operators: rows (norms and gates, each read once) and one GEMM with its epilogues.

Elementwise work is float32.  A row of the norm lies in one tile, so its mean and variance take two passes over
registers.  Row numbers are 64-bit where they meet a stride.

Shapes: rows (the batch's T), WIDTH of a normalised row (D or V), COLUMNS the power of two that holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.triton_common.activations import silu, silu_and_slope
from gr_kernels.triton_common.random import kept


@triton.jit
def _statistics(x, inside, eps, WIDTH: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of every row of a tile that is 0 outside."""
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)


@triton.jit
def _affine(standard, weight_ptr, bias_ptr, column, inside):
    """The norm's scale and shift, where it has them."""
    if weight_ptr is not None:
        standard = standard * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        standard = standard + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return standard


@triton.jit
def _norm_gradient(d_standard, standard, rstd, inside, WIDTH: tl.constexpr):
    """d_x = rstd (g - mean(g) - z mean(g z)), with z = (x - mean) rstd and g the gradient of z."""
    d_standard = tl.where(inside[None, :], d_standard, 0.0)
    standard = tl.where(inside[None, :], standard, 0.0)
    along_one = tl.sum(d_standard, 1) / WIDTH
    along_z = tl.sum(d_standard * standard, 1) / WIDTH
    return rstd[:, None] * (d_standard - along_one[:, None] - standard * along_z[:, None])


@triton.jit
def _kept_scaled(row, key_low, key_high, drop_last, keep_scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS): 0 for what dropout zeroes, keep_scale for the rest."""
    keep = kept(
        key_low.to(tl.uint32),
        key_high.to(tl.uint32),
        row.to(tl.uint32),
        0,
        0,
        drop_last.to(tl.uint32),
        COLUMNS,
    )
    return tl.where(keep, keep_scale, 0.0)


@triton.jit(do_not_specialize=["rows"])
def normalise(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    normed_ptr,
    rows,
    stride_x,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """Mean and 1 / deviation of every row (MEASURE: found and stored, else read), and LN(x) if normed_ptr is given."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists, inside = row < rows, column < WIDTH
    tile = exists[:, None] & inside[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=tile, other=0.0).to(tl.float32)
    if MEASURE:
        mean, rstd = _statistics(x, inside, eps, WIDTH)
        tl.store(mean_ptr + row, mean, mask=exists)
        tl.store(rstd_ptr + row, rstd, mask=exists)
    else:
        mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
    if normed_ptr is not None:
        normed = _affine((x - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, column, inside)
        normed = normed.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row[:, None] * WIDTH + column[None, :], normed, mask=tile)


@triton.jit(do_not_specialize=["rows"])
def normalise_backward(
    d_normed_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    d_x_ptr,
    d_weight_ptr,
    d_bias_ptr,
    rows,
    stride_x,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STANDARD: tl.constexpr,
):
    """Gradient of x, and this program's part of those of the scale and the shift, (programs, WIDTH) each.

    STANDARD: x_ptr holds (x - mean) rstd already.
    """
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    d_weight = tl.zeros([COLUMNS], tl.float32)
    d_bias = tl.zeros([COLUMNS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        tile = exists[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=tile, other=0.0).to(tl.float32)
        dense = row[:, None] * WIDTH + column[None, :]
        d_normed = tl.load(d_normed_ptr + dense, mask=tile, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
        if STANDARD:
            standard = x
        else:
            mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
            standard = (x - mean[:, None]) * rstd[:, None]
        if d_weight_ptr is not None:
            d_weight += tl.sum(d_normed * standard, 0)
        if d_bias_ptr is not None:
            d_bias += tl.sum(d_normed, 0)
        d_standard = _affine(d_normed, weight_ptr, None, column, inside)
        d_x = _norm_gradient(d_standard, standard, rstd, inside, WIDTH)
        tl.store(d_x_ptr + dense, d_x.to(d_x_ptr.dtype.element_ty), mask=tile)
    part = tl.program_id(0) * WIDTH + column
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + part, d_weight, mask=inside)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + part, d_bias, mask=inside)


@triton.jit(do_not_specialize=["rows", "key_low", "key_high", "drop_last"])
def gate(
    attended_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    gated_ptr,
    rows,
    stride_attended,
    stride_gate,
    eps,
    key_low,
    key_high,
    drop_last,
    keep_scale,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dropout(LN(attended) gate), and the norm's statistics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists, inside = row < rows, column < WIDTH
    tile = exists[:, None] & inside[None, :]
    attended_at = attended_ptr + row[:, None] * stride_attended + column[None, :]
    attended = tl.load(attended_at, mask=tile, other=0.0).to(tl.float32)
    gate_at = gate_ptr + row[:, None] * stride_gate + column[None, :]
    u = tl.load(gate_at, mask=tile, other=0.0).to(tl.float32)
    mean, rstd = _statistics(attended, inside, eps, WIDTH)
    tl.store(mean_ptr + row, mean, mask=exists)
    tl.store(rstd_ptr + row, rstd, mask=exists)
    gated = _affine((attended - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, column, inside) * u
    if DROPOUT:
        gated *= _kept_scaled(row, key_low, key_high, drop_last, keep_scale, ROWS, COLUMNS)
    dense = row[:, None] * WIDTH + column[None, :]
    tl.store(gated_ptr + dense, gated.to(gated_ptr.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["rows", "key_low", "key_high", "drop_last"])
def gate_backward(
    d_gated_ptr,
    attended_ptr,
    gate_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    d_attended_ptr,
    d_gate_ptr,
    gated_ptr,
    d_weight_ptr,
    d_bias_ptr,
    rows,
    stride_attended,
    stride_gate,
    key_low,
    key_high,
    drop_last,
    keep_scale,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Gradients of attended and gate, this program's part of those of the scale and the shift, and the gated rows
    once more where gated_ptr is given."""
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    d_weight = tl.zeros([COLUMNS], tl.float32)
    d_bias = tl.zeros([COLUMNS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        tile = exists[:, None] & inside[None, :]
        dense = row[:, None] * WIDTH + column[None, :]
        attended_at = attended_ptr + row[:, None] * stride_attended + column[None, :]
        attended = tl.load(attended_at, mask=tile, other=0.0).to(tl.float32)
        u = tl.load(gate_ptr + row[:, None] * stride_gate + column[None, :], mask=tile, other=0.0).to(
            tl.float32
        )
        d_gated = tl.load(d_gated_ptr + dense, mask=tile, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
        standard = (attended - mean[:, None]) * rstd[:, None]
        normed = _affine(standard, weight_ptr, bias_ptr, column, inside)
        if DROPOUT:
            keep = _kept_scaled(row, key_low, key_high, drop_last, keep_scale, ROWS, COLUMNS)
            d_gated *= keep
            if gated_ptr is not None:
                gated = normed * u * keep
                tl.store(gated_ptr + dense, gated.to(gated_ptr.dtype.element_ty), mask=tile)
        else:
            if gated_ptr is not None:
                tl.store(gated_ptr + dense, (normed * u).to(gated_ptr.dtype.element_ty), mask=tile)
        tl.store(d_gate_ptr + dense, (d_gated * normed).to(d_gate_ptr.dtype.element_ty), mask=tile)
        d_normed = d_gated * u
        if d_weight_ptr is not None:
            d_weight += tl.sum(d_normed * standard, 0)
        if d_bias_ptr is not None:
            d_bias += tl.sum(d_normed, 0)
        d_standard = _affine(d_normed, weight_ptr, None, column, inside)
        d_attended = _norm_gradient(d_standard, standard, rstd, inside, WIDTH)
        tl.store(d_attended_ptr + dense, d_attended.to(d_attended_ptr.dtype.element_ty), mask=tile)
    part = tl.program_id(0) * WIDTH + column
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + part, d_weight, mask=inside)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + part, d_bias, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    other_ptr,
    other_1_ptr,
    other_2_ptr,
    other_3_ptr,
    linear_ptr,
    out_ptr,
    rows,
    stride_x,
    stride_other,
    stride_1,
    stride_2,
    stride_3,
    K: tl.constexpr,
    N: tl.constexpr,
    END_0: tl.constexpr,
    END_1: tl.constexpr,
    END_2: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x W^T + b for a tile of rows and outputs, x normalised on its way in if NORMALISE, and stored as
    "silu": SiLU(y), and y itself where linear_ptr is given;  "slope": other SiLU'(y);  "residual": other + y.
    other may come in up to four parts side by side: other, 1, 2 and 3 begin at columns 0, END_0, END_1 and END_2,
    multiples of BLOCK_N; those beyond the last part are N.

    The column tiles of a block of rows are neighbours in the grid: they find its rows in the L2 cache, where all of
    W is.  Rows past the last are the last one again, and aren't stored; columns past the last likewise.
    """
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program % tiles_n).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_read = tl.minimum(row, rows - 1)
    column_read = tl.minimum(column, N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row_read[:, None] * stride_x + k[None, :]
    weight_at = weight_ptr + k[:, None] + column_read[None, :] * K
    if NORMALISE:
        mean = tl.load(mean_ptr + row_read)
        rstd = tl.load(rstd_ptr + row_read)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            inside = start + k < K
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
        if NORMALISE:
            normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            x = _affine(normed, norm_weight_ptr, norm_bias_ptr, start + k, start + k < K)
        y = tl.dot(x.to(weight.dtype), weight, y, input_precision=PRECISION)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column_read).to(tl.float32)[None, :]
    stored = (row < rows)[:, None] & (column < N)[None, :]
    dense = row[:, None] * N + column[None, :]
    if EPILOGUE == "silu":
        if linear_ptr is not None:
            tl.store(linear_ptr + dense, y.to(linear_ptr.dtype.element_ty), mask=stored)
        y = silu(y, FAST)
    else:
        first = (program % tiles_n).to(tl.int32) * BLOCK_N
        part_ptr = other_ptr
        stride = tl.cast(stride_other, tl.int64)
        if END_0 < N:  # noqa: SIM102  (known at compile time: no such part, no code)
            if first >= END_0:
                part_ptr = other_1_ptr - END_0
                stride = tl.cast(stride_1, tl.int64)
        if END_1 < N:  # noqa: SIM102  (known at compile time: no such part, no code)
            if first >= END_1:
                part_ptr = other_2_ptr - END_1
                stride = tl.cast(stride_2, tl.int64)
        if END_2 < N:  # noqa: SIM102  (known at compile time: no such part, no code)
            if first >= END_2:
                part_ptr = other_3_ptr - END_2
                stride = tl.cast(stride_3, tl.int64)
        other_at = part_ptr + row[:, None] * stride + column[None, :]
        other = tl.load(other_at, mask=stored, other=0.0).to(tl.float32)
        if EPILOGUE == "slope":
            _, slope = silu_and_slope(y, FAST)
            y = other * slope
        else:
            y = other + y
    tl.store(out_ptr + dense, y.to(out_ptr.dtype.element_ty), mask=stored)
