"""Jagged dropout in Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gr_kernels.jagged.dropout.reference import drop_below, keep_scale
from gr_kernels.jagged.tiles import WARPS, dropout_tile
from gr_kernels.triton_common.available import on, why_unavailable, wrong_dtype


def obstacle(x: Tensor) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if reason := wrong_dtype(x.dtype):
        return reason
    return why_unavailable(x.device)


def dropout(x: Tensor, probability: float, key: int, rows: Tensor | None = None) -> Tensor:
    """reference.dropout() for a call without obstacle."""
    from gr_kernels.jagged.dropout import triton_kernel

    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        count, width = x.shape[0], math.prod(x.shape[1:])
        numbers = None if rows is None else rows.contiguous()
        t = dropout_tile(width)
        with on(x):
            triton_kernel.drop[(-(-count // t.rows), -(-width // t.columns))](
                x, out, numbers, key & 0xFFFFFFFF, key >> 32, min(drop_below(probability), 2**32 - 1),
                keep_scale(probability), count, width,
                BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
            )  # fmt: skip
    return out
