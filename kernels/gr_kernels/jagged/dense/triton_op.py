"""Jagged to padded and back in Triton, as differentiable torch operators: each is the other's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gr_kernels.jagged.concat_split.triton_op import as_integers
from gr_kernels.jagged.tiles import INTEGERS, WARPS, search_steps, tile
from gr_kernels.operators import define
from gr_kernels.tracing import once
from gr_kernels.triton_common.available import on, why_unavailable


def obstacle(x: Tensor) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if x.dtype.itemsize not in INTEGERS:
        return f"it moves numbers of 1, 2, 4 or 8 bytes, not {x.dtype}"
    return why_unavailable(x.device)


def to_dense(x: Tensor, offsets_B1: Tensor, max_length: int, fill: float) -> Tensor:
    return torch.ops.gr_kernels.jagged_to_dense_triton(x, offsets_B1, max_length, fill)  # type: ignore[no-any-return]


def to_jagged(dense: Tensor, offsets_B1: Tensor, rows: int) -> Tensor:
    return torch.ops.gr_kernels.dense_to_jagged_triton(dense, offsets_B1, rows)  # type: ignore[no-any-return]


def _to_dense(x: Tensor, offsets_B1: Tensor, max_length: int, fill: float) -> Tensor:
    from gr_kernels.jagged.dense import triton_kernel

    out = _to_dense_fake(x, offsets_B1, max_length, fill)
    if out.numel():
        dense_rows = as_integers(out.flatten(0, 1))
        width = dense_rows.shape[1]
        bits = int(torch.tensor([fill], dtype=x.dtype).view(INTEGERS[x.dtype.itemsize]))
        t = tile(width, dense_rows.itemsize)
        with on(x):
            triton_kernel.to_dense[(-(-dense_rows.shape[0] // t.rows),)](
                as_integers(x), dense_rows, offsets_B1.contiguous(), bits, dense_rows.shape[0], max_length, width,
                BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
            )  # fmt: skip
    return out


def _to_dense_fake(x: Tensor, offsets_B1: Tensor, max_length: int, fill: float) -> Tensor:
    return x.new_empty((offsets_B1.shape[0] - 1, max_length, *x.shape[1:]))


def _to_jagged(dense: Tensor, offsets_B1: Tensor, rows: int) -> Tensor:
    from gr_kernels.jagged.dense import triton_kernel

    out = _to_jagged_fake(dense, offsets_B1, rows)
    if out.numel():
        out_rows = as_integers(out)
        width, sequences = out_rows.shape[1], offsets_B1.shape[0] - 1
        t = tile(width, out_rows.itemsize)
        with on(dense):
            triton_kernel.to_jagged[(-(-rows // t.rows),)](
                as_integers(dense.flatten(0, 1)), out_rows, offsets_B1.contiguous(),
                rows, sequences, dense.shape[1], width,
                STEPS=search_steps(sequences + 1), BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
            )  # fmt: skip
    return out


def _to_jagged_fake(dense: Tensor, offsets_B1: Tensor, rows: int) -> Tensor:
    return dense.new_empty((rows, *dense.shape[2:]))


def _keep_for_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


def _backward_of_dense(ctx: Any, d_dense: Tensor) -> tuple[Tensor, None, None, None]:
    (offsets_B1,) = ctx.saved_tensors
    return to_jagged(d_dense, offsets_B1, ctx.rows), None, None, None


def _keep_for_jagged(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.places = inputs[0].shape[1]


def _backward_of_jagged(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
    (offsets_B1,) = ctx.saved_tensors
    return to_dense(d_rows, offsets_B1, ctx.places, 0.0), None, None


@once
def register() -> None:
    for name, run, fake, schema, keep, backward in (
        (
            "jagged_to_dense_triton", _to_dense, _to_dense_fake,
            "(Tensor x, Tensor offsets, SymInt max_length, Scalar fill) -> Tensor",
            _keep_for_dense, _backward_of_dense,
        ),
        (
            "dense_to_jagged_triton", _to_jagged, _to_jagged_fake,
            "(Tensor dense, Tensor offsets, SymInt rows) -> Tensor",
            _keep_for_jagged, _backward_of_jagged,
        ),
    ):  # fmt: skip
        define(name, schema, run, fake, backward, keep)
