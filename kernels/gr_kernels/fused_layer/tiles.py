"""Tiles of the kernels, for launching them and for compiling them ahead: one function each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gr_kernels.triton_common.sizes import power_of_two

# A row of a norm lies in one tile of registers.
WIDEST = 16384
# Programs of the row kernels that add up gradients of a norm's parameters; each writes one row of partial sums.
MOST_PARTS = 1024


@dataclass(frozen=True)
class RowTiles:
    rows: int
    columns: int
    warps: int

    @property
    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns}


@dataclass(frozen=True)
class LinearTiles:
    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


def row_tiles(width: int) -> RowTiles:
    """Row kernels are bound by memory: 2,048 numbers a program at 4 warps are 16 a thread and tensor, so that the
    backward of the gate holds its four tensors, and Philox's words, without spilling; wide rows take more warps."""
    columns = max(16, power_of_two(width))
    rows = max(1, 2048 // columns)
    return RowTiles(rows, columns, warps=4 if columns <= 2048 else min(16, columns // 512))


def linear_tiles(dtype: torch.dtype, inputs: int, outputs: int, epilogue: str) -> LinearTiles:
    """The GEMM's tiles for a weight of `dtype`, (outputs, inputs), and an epilogue of the kernel.

    16 bits: 128 rows and 8 warps are two warp groups of wgmma.  128 x 256 makes 85 products of each number it reads
    from L2 where 128 x 128 makes 64, but its sums take 128 registers a thread: an epilogue that reads a second tensor
    would spill, and outputs that 256 doesn't divide would be rounded up.  64 inputs a step are 128 bytes, the width
    of the swizzle.  Three stages: 3 (128 + 256) 64 2 = 147,456 bytes fit on sm_80 too, and two blocks of 128 x 128
    fit on an SM of sm_90, so that one's epilogue runs beside the other's products.
    32 bits: products run on the ordinary cores (or as TF32); the tile is bound by registers.
    """
    k = min(max(16, power_of_two(inputs)), 64)
    if dtype == torch.float32:
        return LinearTiles(64, 64, min(k, 32), warps=4, stages=3)
    wide = epilogue == "silu" and outputs % 256 == 0
    return LinearTiles(128, 256 if wide else 128 if outputs > 64 else 64, k, warps=8, stages=3)
