"""Jagged dropout in Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gr_kernels.jagged.dropout.reference import drop_below, keep_scale
from gr_kernels.jagged.tiles import WARPS, Tile
from gr_kernels.triton_common.available import on, why_unavailable
from gr_kernels.triton_common.sizes import power_of_two


def obstacle(x: Tensor) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 or bfloat16, not {x.dtype}"
    return why_unavailable(x.device)


def tile(width: int) -> Tile:
    """4096 decisions a program: 32 a thread, from 8 calls of Philox, whose words are what fills the registers."""
    columns = min(max(4, power_of_two(width)), 128)
    return Tile(min(64, 4096 // columns), columns)


def dropout(x: Tensor, probability: float, key: int) -> Tensor:
    """reference.dropout() for a call without obstacle."""
    from gr_kernels.jagged.dropout import triton_kernel

    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        rows, width = x.shape[0], math.prod(x.shape[1:])
        t = tile(width)
        with on(x):
            triton_kernel.drop[(-(-rows // t.rows), -(-width // t.columns))](
                x, out, key & 0xFFFFFFFF, key >> 32, min(drop_below(probability), 2**32 - 1),
                keep_scale(probability), rows, width,
                BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
            )  # fmt: skip
    return out
